"""From a checkpoint and the options to a rank's model on its device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vlserve.config import EngineConfig
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model
from vlserve.models.checkpoint import Checkpoint, check_shards

Progress = Callable[[str, int, int], None]


def load_model(checkpoint: Checkpoint, config: EngineConfig, split: Split, device: torch.device, progress: Progress) -> Model:
    """This rank's model with its weights; raises ModelError for a checkpoint that does not fit."""
    check_shards(checkpoint.folder, config)
    dtype = _dtype(checkpoint, config)
    try:
        model = build_model(checkpoint, split).to(dtype)
        model.use_stored_formats(checkpoint.folder, checkpoint.quantisation, dtype)
        model.to_empty(device=device).eval().requires_grad_(False)
        model.load(Path(checkpoint.folder), lambda done, total: progress("weights", done, total))
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from error
    if config.lm_head_bits == 8:
        model.decoder.quantise_head()
    return model


def build_model(checkpoint: Checkpoint, split: Split) -> Model:
    """A rank's model without weights, on torch's meta device; raises ModelError, and ValueError for a wrong config."""
    with torch.device("meta"):  # no memory, and no time for random initial values
        model = checkpoint.architecture.build(checkpoint.config, checkpoint.preprocessor, split)
    if not isinstance(model, Model):
        origin, kind = checkpoint.architecture.origin, type(model).__name__
        raise ModelError(f"{origin}: build gave {kind!r}; expected a vlserve.models.base.Model")
    return model


def resolve_max_model_len(checkpoint: Checkpoint, config: EngineConfig, model: Model) -> int:
    limit = model.decoder.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len {config.max_model_len} is more than the checkpoint's max_position_embeddings {limit}")
    return config.max_model_len or limit


def resolve_device(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """A CUDA device for each rank of this machine, or the CPU; raises ConfigError when there are fewer devices than ranks."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use device='cpu' or check the driver (nvidia-smi)")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if config.ranks_per_node > count:
        raise ConfigError(
            f"tp {config.tp} on {config.nnodes} machine(s) needs {config.ranks_per_node} CUDA devices here, but torch sees "
            f"{count}; give a smaller tp, more machines (nnodes), or check CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def _dtype(checkpoint: Checkpoint, config: EngineConfig) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"config.json's dtype {name!r} is not supported; give dtype=float32, bfloat16 or float16")
    return dtype
