"""Which code serves which `model_type`: what is built in, and what installed packages add.

A package adds a model through the entry-point group `vlserve.models`: the entry point's name is the `model_type` of
config.json, its value an `Architecture`. It is imported only when a checkpoint asks for it, in the front and in the rank;
so what it imports at the top should be light, and `build` import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from vlserve.errors import ModelError
from vlserve.vision.config import ImageConfig, read_encoder_config, read_image_config

if TYPE_CHECKING:
    from vlserve.llm.parallel import Split
    from vlserve.models.base import Model

GROUP = "vlserve.models"
Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the front and a rank must know of a kind of model.

    Args:
        read_image_config: (config.json, the image processor's settings) -> how a picture becomes tiles and how many tokens
            a tile takes. Runs in the front, before torch is imported. Raises ValueError naming the key that is wrong.
        build: (config.json, the image config, how the language model is split) -> this rank's model without weights, on
            torch's meta device. Runs in the rank. Raises ValueError naming the key that is wrong.
        image_tokens: special tokens before, at and after each of a picture's places: (start, placeholder, end); "" for no
            start or end. tokenizer_config.json's start_image_token, context_image_token and end_image_token come first.
    """

    read_image_config: Callable[[Config, Config], ImageConfig]
    build: Callable[[Config, ImageConfig, Split], Model]
    image_tokens: tuple[str, str, str]
    origin: str = "vlserve"  # the package and entry point, for messages; filled in by find_architecture


def find_architecture(config: Config) -> Architecture:
    """The architecture of a config.json; raises ModelError listing what there is, or naming the package that is at fault."""
    model_type = str(config.get("model_type"))
    if model_type in BUILT_IN:
        return BUILT_IN[model_type]
    points = entry_points(group=GROUP)
    found = sorted((point for point in points if point.name == model_type), key=_origin)
    if not found:
        names = ", ".join(sorted({*BUILT_IN, *points.names}))
        raise ModelError(
            f"model_type {model_type!r} (architectures {config.get('architectures')}) is not supported; supported: {names}. "
            f"A package can add it through the entry-point group {GROUP}"
        )
    if len(found) > 1:
        raise ModelError(f"model_type {model_type!r} is given by {' and by '.join(map(_origin, found))}; uninstall all but one")
    return _load(found[0])


def _load(point: EntryPoint) -> Architecture:
    try:
        given = point.load()
    except Exception as error:  # foreign code raises what it likes
        raise ModelError(f"{_origin(point)} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(given, Architecture):
        raise ModelError(f"{_origin(point)} is {type(given).__name__!r}; expected an instance of vlserve.Architecture")
    return replace(given, origin=_origin(point))


def _origin(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
    return f"{package} (entry point {point.name} = {point.value})"


def _build_internvl(config: Config, image_config: ImageConfig, split: Split) -> Model:
    from vlserve.models.internvl import InternVL

    return InternVL(config, image_config, split)


BUILT_IN = {
    "internvl": Architecture(
        read_image_config=lambda config, processor: read_image_config(processor, read_encoder_config(config)),
        build=_build_internvl,
        image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"),
    )
}
