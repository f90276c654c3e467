"""vlserve: a server and a library for vision-language models.

    from vlserve import VLPipeline
    with VLPipeline() as pipe:
        print(pipe(("What shape is it?", "picture.png")).text)

Names are imported when first used: a rank process must not pay for the front's libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlserve.config import EngineConfig, MediaConfig, SamplingParams, StructuredOutput
    from vlserve.errors import ConfigError, EngineError, ModelError, RequestError, VLServeError
    from vlserve.models.architecture import Architecture
    from vlserve.pipeline.outputs import Completion, Delta, Timing, Usage
    from vlserve.pipeline.vl_pipeline import VLPipeline
    from vlserve.server.app import router

__version__ = "0.1.0"

_HOMES = {
    "Architecture": "models.architecture",
    "Completion": "pipeline.outputs",
    "ConfigError": "errors",
    "Delta": "pipeline.outputs",
    "EngineConfig": "config",
    "EngineError": "errors",
    "MediaConfig": "config",
    "ModelError": "errors",
    "RequestError": "errors",
    "SamplingParams": "config",
    "StructuredOutput": "config",
    "Timing": "pipeline.outputs",
    "Usage": "pipeline.outputs",
    "VLPipeline": "pipeline.vl_pipeline",
    "VLServeError": "errors",
    "router": "server.app",
}
__all__ = [
    "Architecture",
    "Completion",
    "ConfigError",
    "Delta",
    "EngineConfig",
    "EngineError",
    "MediaConfig",
    "ModelError",
    "RequestError",
    "SamplingParams",
    "StructuredOutput",
    "Timing",
    "Usage",
    "VLPipeline",
    "VLServeError",
    "__version__",
    "router",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlserve' has no attribute {name!r}")
    return getattr(import_module(f"vlserve.{_HOMES[name]}"), name)
