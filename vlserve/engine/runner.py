"""Owns the model, the KV cache and the feature cache on one device, and runs a step's chunks through them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Set
from pathlib import Path

import torch

from vlserve.checkpoint import Checkpoint
from vlserve.config import EngineConfig
from vlserve.engine.batch import Batch, ImagePiece, make_batch
from vlserve.engine.feature_cache import FeatureCache
from vlserve.engine.model import Model
from vlserve.engine.sampling import Sampler
from vlserve.engine.scheduler import Chunk, Sampled
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.kv_cache import KVCache, block_bytes

GIB = 2**30
Progress = Callable[[str, int, int], None]


class Runner:
    """Built once; `run` is called for every step. `in_use` tells which pictures' features must stay."""

    def __init__(
        self,
        model: Model,
        *,
        checkpoint: Checkpoint,
        config: EngineConfig,
        max_model_len: int,
        in_use: Callable[[], set[bytes]],
    ) -> None:
        self.model = model
        self.device, self.dtype = model.decoder.norm.device, model.decoder.norm.dtype
        self.max_model_len, self.block_size = max_model_len, config.block_size
        model.decoder.prepare(max_model_len, self.device)
        self.num_blocks = _num_blocks(config, model, max_model_len)
        self.cache = KVCache(
            model.decoder.config, num_blocks=self.num_blocks, block_size=self.block_size, dtype=self.dtype, device=self.device
        )
        self.features = FeatureCache(int(config.vision_cache_gib * GIB), in_use)
        self.sampler = Sampler(checkpoint.end_token_ids)
        self.image_queries = self.image_hits = 0  # pictures
        self.encode_s = 0.0
        self._fixed_bytes = {
            "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            "kv_cache": self.num_blocks * block_bytes(model.decoder.config, self.block_size, self.dtype),
        }

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        """Compute a step; one result for each chunk that samples, in order."""
        batch = make_batch(chunks, self.block_size, self.device)
        x = self.model.decoder.embed(batch.ids)
        if batch.pieces:
            self._encode_missing(batch.pieces, chunks)
            self._fill_in(x, batch)
        self.cache.clear(batch.partial_blocks)
        hidden = self.model.decoder(x, batch.positions, self.cache, batch.metadata)
        self.features.trim()
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if not sampling:
            return []
        return self.sampler.sample(self.model.decoder.logits(hidden[batch.sample_rows]), sampling)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One tile through the encoder and one row through the head, so that the first request is not slow."""
        size = self.model.image_config.tile_size
        self.model.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.model.decoder.logits(self.model.decoder.embed(torch.zeros(1, dtype=torch.int64, device=self.device)))

    def device_bytes(self) -> dict[str, int]:
        """Bytes by kind; on CUDA they add up to what torch has allocated. On the CPU pages that were never used count too."""
        known = self._fixed_bytes | {"vision_cache": self.features.num_bytes}
        if self.device.type != "cuda":
            return known
        # the nested form is what memory_allocated() reads too, without sorting a hundred entries at every step
        allocated = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["current"]
        return known | {"other": allocated - sum(known.values())}

    def _encode_missing(self, pieces: tuple[ImagePiece, ...], chunks: list[Chunk]) -> None:
        missing = {p.image.digest: p.image for p in pieces if self.features.get(p.image.digest) is None}
        self._count_images(chunks, missing.keys())
        if not missing:
            return
        start = time.monotonic()
        images = list(missing.values())
        counts = [len(image.pixels) for image in images]
        encoded = self.model.encode(torch.cat([image.pixels for image in images])).split(counts)
        for image, features in zip(images, encoded, strict=True):
            self.features.put(image.digest, features.flatten(0, 1).clone())
        if self.device.type == "cuda":  # its kernels run behind: without this only their launch is timed
            torch.cuda.synchronize(self.device)
        elapsed = time.monotonic() - start
        self.encode_s += elapsed
        for chunk in chunks:
            if any(image.digest in missing for image in chunk.sequence.images):
                chunk.sequence.encode_s += elapsed

    def _count_images(self, chunks: list[Chunk], missing: Set[bytes]) -> None:
        """A picture of a request counts once, where its first token that is not in the prefix cache is computed."""
        begun = [
            image.digest
            for chunk in chunks
            for image in chunk.sequence.images
            if chunk.start <= max(image.start, chunk.sequence.num_cached_tokens) < min(chunk.stop, image.stop)
        ]
        found = len(begun) - len(missing & set(begun))
        self.image_hits += found
        self.image_queries += found + len(missing)

    def _fill_in(self, x: torch.Tensor, batch: Batch) -> None:
        for piece in batch.pieces:
            features = self.features.get(piece.image.digest)
            assert features is not None, "features were encoded above and nothing was dropped since"
            x[piece.row : piece.row + piece.stop - piece.start] = features[piece.start : piece.stop]


def load_model(checkpoint: Checkpoint, config: EngineConfig, progress: Progress) -> Model:
    """The model with its weights on its device; raises ModelError for a checkpoint that does not fit."""
    device, dtype = _device(config), _dtype(checkpoint, config)
    try:
        with torch.device("meta"):  # no memory yet, and no time for random initial values
            model = checkpoint.architecture.build(checkpoint.config, checkpoint.image_config)
        if not isinstance(model, Model):
            origin, kind = checkpoint.architecture.origin, type(model).__name__
            raise ModelError(f"{origin}: build gave {kind!r}; expected a vlserve.engine.model.Model")
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        model.load(Path(checkpoint.folder), lambda done, total: progress("weights", done, total))
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from error
    return model


def resolve_max_model_len(checkpoint: Checkpoint, config: EngineConfig, model: Model) -> int:
    limit = model.decoder.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len {config.max_model_len} is more than the checkpoint's max_position_embeddings {limit}")
    return config.max_model_len or limit


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use device='cpu' or check the driver (nvidia-smi)")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def _dtype(checkpoint: Checkpoint, config: EngineConfig) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"config.json's dtype {name!r} is not supported; give dtype=float32, bfloat16 or float16")
    return dtype


def _num_blocks(config: EngineConfig, model: Model, max_model_len: int) -> int:
    """Blocks that fit; enough for `max_num_seqs` full contexts where memory allows."""
    parameter = model.decoder.norm
    per_block = block_bytes(model.decoder.config, config.block_size, parameter.dtype)
    per_sequence = -(-max_model_len // config.block_size)
    if config.kv_cache_gib is not None:
        num_blocks = int(config.kv_cache_gib * GIB // per_block)
    else:
        num_blocks = min(config.max_num_seqs * per_sequence, int(_free_bytes(config, parameter.device) // per_block))
    if num_blocks < per_sequence:
        have, need = num_blocks * per_block / GIB, per_sequence * per_block / GIB
        raise ConfigError(
            f"the KV cache would have {have:.2f} GiB, but one request of max_model_len {max_model_len} needs {need:.2f} GiB; "
            f"set kv_cache_gib to {need:.2f} or more, or max_model_len to {num_blocks * config.block_size} or less"
        )
    return num_blocks


def _free_bytes(config: EngineConfig, device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - (1 - config.gpu_memory_utilization) * total
    return _available_memory() / 4


def _available_memory() -> float:
    """Bytes that this process may still take: the machine's, within a container's limit (cgroup v2)."""
    available: float = 4 * GIB  # where the system does not say
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available
