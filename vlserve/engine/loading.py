"""From a checkpoint and the options to a rank's model on its device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from vlserve.config import EngineConfig
from vlserve.engine.memory import check_weights, in_the_plans_words
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model
from vlserve.models.checkpoint import Checkpoint, check_shards
from vlserve.plan.tp_plan import choose_dtype, choose_max_model_len

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def load_model(checkpoint: Checkpoint, config: EngineConfig, split: Split, device: torch.device, progress: Progress) -> Model:
    """This rank's model with its weights; raises ModelError for a checkpoint that does not fit."""
    check_shards(checkpoint.folder, config)
    dtype: torch.dtype = getattr(torch, choose_dtype(checkpoint.config, config.dtype))
    try:
        model = build_model(checkpoint, split).to(dtype)
        model.use_stored_formats(checkpoint.folder, checkpoint.quantisation, dtype)
        with in_the_plans_words(checkpoint, config, device):
            check_weights(config, model, device)
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


def resolve_max_model_len(config: EngineConfig, model: Model) -> int:
    decoder = model.decoder.config
    length = choose_max_model_len(config.max_model_len, decoder)
    if decoder.unscaled_context is not None and length > decoder.unscaled_context:
        log.warning(
            "%s rope scaling: frequencies are those of a text of max_model_len %d tokens, for shorter texts too; "
            "transformers changes them with each text's length",
            *(decoder.rope.rope_type, length),
        )
    return length


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
