"""How much memory a rank's KV cache may take, and what the rank holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vlserve.config import EngineConfig
from vlserve.errors import ConfigError
from vlserve.llm.formats_int4 import GroupedInt4Format
from vlserve.llm.kv_cache import block_bytes
from vlserve.llm.quantisation import find_quantisation
from vlserve.models.base import Model
from vlserve.models.checkpoint import Checkpoint
from vlserve.plan.cuda_graph_sizes import graph_bytes
from vlserve.plan.footprint import Step, feature_bytes, shard, step_bytes
from vlserve.plan.host_memory import available_memory
from vlserve.plan.model_shape import read_model_shape
from vlserve.plan.tp_plan import make_plan

GIB = 2**30


def release_leftovers(device: torch.device) -> None:
    """Give back what loading used, so that it is not counted as taken when the KV cache is sized."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def weight_bytes(model: Model) -> dict[str, int]:
    """Bytes of the parameters: the language model's layers, its embedding and head, and the rest, which is vision."""
    decoder = model.decoder
    tables = [table for table in (decoder.embed_tokens, decoder.lm_head) if table is not None]
    embedding = sum(parameter.nbytes for table in tables for parameter in table.parameters())
    layers = sum(parameter.nbytes for parameter in decoder.parameters()) - embedding
    everything = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    packed = sum(module.packed_bytes for module in decoder.modules() if isinstance(module, GroupedInt4Format))
    return {"vision": everything - layers - embedding, "decoder": layers + packed, "embedding": embedding}


@contextlib.contextmanager
def in_the_plans_words(checkpoint: Checkpoint, config: EngineConfig, device: torch.device) -> Iterator[None]:
    """What does not fit on a CUDA device is said as `vlserve plan` says it, where the plan comes to the same result."""
    try:
        yield
    except ConfigError as error:
        is_known = config.kv_cache_gib is None and find_quantisation(checkpoint.config) == checkpoint.quantisation
        if device.type != "cuda" or not is_known:
            raise
        names = "dtype lm_head_bits kv_cache_dtype gpu_memory_utilization max_model_len replicate_kv_heads max_num_seqs"
        names += " max_num_batched_tokens block_size enforce_eager vision_cache_gib"
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        options = {name: getattr(config, name) for name in names.split()}
        reason = make_plan(checkpoint.config, tp=config.tp, device_memory=total, **options).reason
        if reason is None:
            raise
        raise ConfigError(reason) from error


def check_weights(config: EngineConfig, model: Model, device: torch.device) -> None:
    """Before they are loaded; raises ConfigError where they alone are more than may be used of a CUDA device."""
    if device.type != "cuda":
        return
    needed, free = sum(weight_bytes(model).values()), _free_bytes(config, device)
    if needed > free:
        raise ConfigError(
            f"the weights take {needed / GIB:.2f} GiB of the device, and {max(0, free) / GIB:.2f} GiB may be used; take a larger "
            "tp (--tp), or see what else uses the device (nvidia-smi)"
        )


def fit_blocks(config: EngineConfig, model: Model, max_model_len: int, peak_bytes: int) -> int:
    """Blocks that fit on this rank beside `peak_bytes` of activations; for `max_num_seqs` full contexts where memory allows.

    Raises ConfigError when not even one request fits.
    """
    parameter = model.decoder.norm
    decoder = model.decoder
    per_block = block_bytes(decoder.cache_kinds, config.block_size, parameter.dtype, config.kv_cache_dtype)
    per_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_gib is not None:
        num_blocks = int(config.kv_cache_gib * GIB // per_block)
    else:
        free = _free_bytes(config, parameter.device) - peak_bytes
        num_blocks = min(config.max_num_seqs * per_sequence, int(max(0, free) // per_block))
    if num_blocks < per_sequence:
        have, need = num_blocks * per_block / GIB, per_sequence * per_block / GIB
        shorter = f", or max_model_len (--max-model-len) to {num_blocks * config.block_size} or less" if num_blocks else ""
        raise ConfigError(
            f"the KV cache would have {have:.2f} GiB, but one request of max_model_len {max_model_len} needs {need:.2f} GiB; "
            f"set kv_cache_gib (--kv-cache-gib) to {math.ceil(need * 100) / 100:.2f} or more{shorter}"
        )
    return num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Bytes of this rank, as `vlserve plan` counts them."""

    step: int = 0  # the fullest moment of a step
    features: int = 0  # of pictures
    graphs: int = 0  # 0 where there are to be none


NOTHING = Planned()


def planned_bytes(checkpoint: Checkpoint, config: EngineConfig, model: Model, max_model_len: int) -> Planned:
    step = Step.of(config, model.decoder.norm.dtype.itemsize, max_model_len)
    shape = read_model_shape(checkpoint.config)
    shape = replace(shape, decoder=replace(shape.decoder, quantisation=checkpoint.quantisation))  # or a file's beside config.json
    if model.tower is None:
        shape = replace(shape, encoder=None, sized=None, counted=None)
    part = shard(shape.decoder, config.tp)
    return Planned(
        step=step_bytes(shape, part, step, is_first=model.decoder.split.group.rank == 0),
        features=feature_bytes(shape, step),
        graphs=0 if config.enforce_eager else graph_bytes(shape, part, step),
    )


def _free_bytes(config: EngineConfig, device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - (1 - config.gpu_memory_utilization) * total
    return available_memory() / 4 / config.ranks_per_node
