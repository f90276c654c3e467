"""Which class serves which architecture. Third parties add theirs through the entry-point group `vlserve.models`.

An entry point's name is the config's `model_type`; its value a callable like `InternVL`:
(config, image_config) -> a module with `decoder`, `encode`, `load` and `image_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from vlserve.engine.model import InternVL
from vlserve.errors import ModelError
from vlserve.vision.config import ImageConfig

BUILT_IN: dict[str, Callable[[Mapping[str, Any], ImageConfig], InternVL]] = {"internvl": InternVL}


def find_model(config: Mapping[str, Any]) -> Callable[[Mapping[str, Any], ImageConfig], InternVL]:
    """The class for a config.json; raises ModelError listing what there is."""
    model_type = str(config.get("model_type"))
    if model_type in BUILT_IN:
        return BUILT_IN[model_type]
    plugins = {point.name: point for point in entry_points(group="vlserve.models")}
    if model_type in plugins:
        return plugins[model_type].load()
    raise ModelError(
        f"model_type {model_type!r} (architectures {config.get('architectures')}) is not supported; "
        f"supported: {', '.join(sorted({*BUILT_IN, *plugins}))}"
    )
