"""Which family serves which `model_type`: what is built in, and what installed packages add.

A package adds a model through the entry-point group `vlserve.models`: the entry point's name is the `model_type` of
config.json, its value an `Architecture`. It is imported only when a checkpoint asks for it, in the front and in the rank;
so what it imports at the top should be light, and `build` import torch.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from vlserve.errors import ModelError
from vlserve.models.architecture import Architecture, Config
from vlserve.models.internvl import INTERNVL
from vlserve.models.internvl_chat import INTERNVL_CHAT
from vlserve.models.qwen2_5_vl import QWEN2_5_VL
from vlserve.models.qwen2_vl import QWEN2_VL
from vlserve.models.qwen3_vl import QWEN3_VL
from vlserve.models.text import TEXT_MODELS

GROUP = "vlserve.models"
QWEN_VL = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": QWEN2_5_VL, "qwen3_vl": QWEN3_VL}
BUILT_IN = {"internvl": INTERNVL, "internvl_chat": INTERNVL_CHAT, **QWEN_VL, **TEXT_MODELS}


def find_architecture(config: Config, *, language_model_only: bool = False) -> Architecture:
    """The architecture of a config.json; raises ModelError listing what there is, or naming the package that is at fault."""
    found = _find(config)
    if not language_model_only:
        return found
    if found.language_model is None:
        raise ModelError(
            f"language_model_only: {found.origin} does not serve model_type {config.get('model_type')!r} without its encoder; "
            "serve it with pictures"
        )
    return replace(found.language_model, origin=found.origin)


def _find(config: Config) -> Architecture:
    model_type = str(config.get("model_type"))
    if model_type in BUILT_IN:
        return BUILT_IN[model_type]
    points = entry_points(group=GROUP)
    found = sorted((point for point in points if point.name == model_type), key=_origin)
    if not found:
        names = ", ".join(sorted({*BUILT_IN, *points.names}))
        if config.get("model_type") is None:
            raise ModelError(f"config.json has no model_type, which says how to read it; supported: {names}")
        classes = f" (architectures {config['architectures']})" if config.get("architectures") else ""
        raise ModelError(
            f"model_type {model_type!r}{classes} is not supported; supported: {names}. "
            f"A package can add it through the entry-point group {GROUP}"
        )
    if len(found) > 1:
        raise ModelError(f"model_type {model_type!r} is given by {' and by '.join(map(_origin, found))}; uninstall all but one")
    return _load(found[0])


def _load(point: EntryPoint) -> Architecture:
    try:
        given = point.load()
    except Exception as error:  # foreign code raises what it likes
        is_older = isinstance(error, TypeError) and "Architecture" in str(error)
        hint = ". It was written for an earlier vlserve; docs/adding_a_model.md says what has changed" if is_older else ""
        raise ModelError(f"{_origin(point)} cannot be imported: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(given, Architecture):
        raise ModelError(f"{_origin(point)} is {type(given).__name__!r}; expected an instance of vlserve.Architecture")
    return replace(given, origin=_origin(point))


def _origin(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
    return f"{package} (entry point {point.name} = {point.value})"
