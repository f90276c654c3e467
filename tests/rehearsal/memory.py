"""Planned bytes against counted ones: a whole engine of a published size on a card that is not there, with tensors that have sizes
and no numbers.

The count is that of torch's allocator: each tensor's bytes, rounded up to 512. What it does not have: the blocks of 2 and 20 MiB
in which the allocator asks the driver for memory (`kSmallBuffer`, `kLargeBuffer` in c10/core/AllocatorConfig.h) and what is lost
between them, the libraries' workspaces, and NCCL's buffers; the driver's own share is a the allowance that the plan makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

from tests.rehearsal.cuda import H100, RTX4090, Card, Rehearsal, install
from tests.rehearsal.launches import Launches
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine, Seat
from vlserve.engine.grammar import Grammar
from vlserve.engine.messages import Add, MediaRef
from vlserve.engine.runner import Runner
from vlserve.llm import detect_formats, int4_packing, weights
from vlserve.llm.int4_packing import AWQ
from vlserve.llm.tensor_parallel import Group
from vlserve.models.registry import find_architecture

MIB, GIB = 2**20, 2**30
CARDS = {"80 GB": H100, "24 GB": RTX4090}
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
VIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_6B = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}
IMAGE = {
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 12,
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 0.00392156862745098,
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "resample": 3,
    "size": {"height": 448, "width": 448},
}


def internvl(heads: int, kv_heads: int, hidden: int, width: int, layers: int, *, is_large: bool = False) -> dict[str, Any]:
    """InternVL3's config.json in transformers' format, as published ("-hf"); Qwen2.5 and InternViT."""
    text = {
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "eos_token_id": 151645,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    norms = {"norm_type": "rms_norm" if is_large else "layer_norm", "attention_bias": not is_large, "use_qk_norm": is_large}
    vision = {**(VIT_6B if is_large else VIT_300M), **norms, "image_size": [448, 448], "patch_size": [14, 14]}
    outer = {"model_type": "internvl", "torch_dtype": "bfloat16", "image_token_id": 151667, "downsample_ratio": 0.5}
    return {**outer, "tie_word_embeddings": False, "text_config": text, "vision_config": vision}


PUBLISHED = {
    "InternVL3-1B": internvl(14, 2, 896, 4864, 24),
    "InternVL3-8B": internvl(28, 4, 3584, 18944, 28),
    "InternVL3-38B": internvl(40, 8, 5120, 27648, 64, is_large=True),
    "InternVL3-78B": internvl(64, 8, 8192, 29568, 80, is_large=True),
}


def config_of(name: str) -> dict[str, Any]:
    """By its name; one that ends with -AWQ has 4 bits in groups of 128, and float16."""
    config = PUBLISHED[name.removesuffix("-AWQ")]
    if not name.endswith("-AWQ"):
        return config
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return config | {"torch_dtype": "float16", "quantization_config": awq | {"modules_to_not_convert": ["vision_tower"]}}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """The files of a checkpoint whose weights are a hole behind their header."""
    for name, content in {
        "config.json": config,
        "preprocessor_config.json": IMAGE,
        "processor_config.json": {"image_seq_length": 256, "processor_class": "InternVLProcessor"},
    }.items():
        (folder / name).write_text(json.dumps(content))
    code = "F16" if config["torch_dtype"] == "float16" else "BF16"
    header, end = dict[str, Any](), 0
    for name, shape in _stored_shapes(config).items():
        kind = "I32" if name.endswith(("qweight", "qzeros")) else code
        size = torch.Size(shape).numel() * TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + end)
    return folder


def _stored_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from vlserve.llm.tensor_parallel import Split

    architecture = find_architecture(config)
    preprocessor = architecture.preprocessor(config, {"preprocessor_config.json": IMAGE})
    with torch.device("meta"):
        model = architecture.build(config, preprocessor, Split())
    shapes = {name: weights.slot_of(target).full for name, target in model.targets().items()}
    if "quantization_config" in config:
        for prefix, linear in model.decoder.linears():
            for name, (_, size) in linear.format.outputs.items():
                del shapes[f"{model.prefix}{prefix}{name}.weight"]
                packed = AWQ["gemm"].shapes(size, linear.format.in_features, 128)
                shapes |= {f"{model.prefix}{prefix}{name}.{key}": shape for key, shape in packed.items()}
    return shapes


class Header:
    """`safetensors.safe_open`, of which only the header is read: its tensors have no numbers."""

    def __init__(self, path: Path, framework: str) -> None:
        with path.open("rb") as file:
            self._entries: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))

    def __enter__(self) -> Header:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._entries)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> Stored:
        return Stored(**{key: self._entries[name][key] for key in ("dtype", "shape")})


@dataclass(frozen=True)
class Stored:
    """A handle on a tensor, as safetensors gives it."""

    dtype: str
    shape: list[int]

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, place: Any) -> torch.Tensor:
        return torch.empty(self.shape, dtype=TYPES[self.dtype], device="meta")[place]


class OneOf(Group):
    """A rank of several, without the others: collectives take the memory that NCCL's take, and bring nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: torch.Tensor, kind: str) -> torch.Tensor | None:
        return torch.cat([torch.empty_like(x) for _ in range(self.size)], dim=-1) if self.rank == 0 else None

    def all_gather(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return x.new_empty((self.size, *x.shape))


class Anything(Grammar):
    """Allows every token."""

    def __init__(self) -> None:
        self.is_finished = False

    is_ready = True
    error = None

    def cancel(self) -> None:
        pass

    def fill(self, bitmask: torch.Tensor, row: int) -> None:
        bitmask[row] = -1

    def accept(self, token_id: int) -> bool:
        return True


@contextmanager
def rehearsed(card: Card, utilization: float = 0.9) -> Iterator[Rehearsal]:
    """A card that gives no more than the share of it that an engine may use."""
    with pytest.MonkeyPatch.context() as patch:
        rehearsal = Rehearsal(card)
        rehearsal.shared.is_meta = True
        install(patch, rehearsal)
        Launches(rehearsal.shared).install(patch)
        free, total = torch.cuda.mem_get_info()
        rehearsal.memory().limit = int(free - (1 - utilization) * total)
        patch.setattr(weights, "safe_open", Header)
        patch.setattr(detect_formats, "safe_open", Header)
        patch.setattr(int4_packing, "AT_ONCE", 2**40)  # codes unpacked at a time on the host
        with rehearsal.entered():
            yield rehearsal


@dataclass(kw_only=True)
class Counted:
    """Bytes of one rank."""

    weights: int = 0
    kv_cache: int = 0
    kv_tokens: int = 0
    loading: int = 0  # the most before the KV cache
    measured: int = 0  # activations, as the engine measures them
    graphs: int = 0  # buffers, and the pool
    steps: dict[str, int] = field(default_factory=dict)  # the most beside weights, KV cache and graphs, by step
    peak: int = 0


class Trial:
    """An engine of a rank, and what it takes."""

    def __init__(self, card: Rehearsal, folder: Path, tp: int, rank: int = 0, **options: Any) -> None:
        self.memory, self.counted, self.base = card.memory(), Counted(), 0
        self.config = EngineConfig(model=str(folder), device="cuda", tp=tp, **options)
        with pytest.MonkeyPatch.context() as patch:
            measure = Runner._measure_peak

            def measured(runner: Runner, *args: Any) -> int:
                self.counted.measured = measure(runner, *args)
                return self.counted.measured

            patch.setattr(Runner, "_measure_peak", measured)
            patch.setattr(torch.cuda, "device_count", lambda: tp)
            seat = Seat(group=OneOf(rank, tp) if tp > 1 else Group())
            self.engine = Engine(self.config, self._stage, seat=seat)
        self.counted.kv_cache = self.engine.runner.device_bytes()["kv_cache"]
        self.counted.kv_tokens = self.engine.runner.num_blocks * self.config.block_size

    def _stage(self, name: str, done: int, total: int) -> None:
        if name == "kv cache":
            self.counted.weights, self.counted.loading = self.memory.now, self.memory.peak

    def run(self) -> Counted:
        """The largest steps, one after another."""
        engine, config = self.engine, self.config
        engine.grammars.start = lambda structured: Anything()  # type: ignore[method-assign]
        self.base = self.memory.now
        picture, length = self._picture(), engine.runner.max_model_len
        number = min(config.max_num_seqs, self.counted.kv_tokens // (picture + 48))
        self._seen_before([self._request(i, picture) for i in range(number)], config.max_num_batched_tokens // number)
        self._step("pictures")  # each request's last tokens, and its picture anew
        while any(s.num_computed < s.num_prompt_tokens for s in (*engine.scheduler.running, *engine.scheduler.waiting)):
            self._step("pictures")
        for _ in range(3):  # done, recorded, replayed
            self._step("decodes")
        self._abort()
        self._seen_before([self._request(number, 0, length - 8)], config.max_num_batched_tokens)
        for _ in range(2):
            self._step("a long context")
        self._abort()
        self.counted.graphs = self.memory.pool + self.memory.now - self.base - engine.runner.device_bytes()["vision_cache"]
        return self.counted

    def _picture(self) -> int:
        """Features of the largest one."""
        tower = self.engine.runner.model.tower
        assert tower is not None and tower.fixed_unit is not None
        return 13 * tower.fixed_unit.num_features

    def _request(self, id: int, picture: int, length: int = 0) -> Add:
        """All that costs memory in sampling; with a picture, which ends its prompt."""
        media = []
        if picture:
            tower = self.engine.runner.model.tower
            assert tower is not None and tower.fixed_unit is not None
            media = [MediaRef(digest=bytes([id] * 32), units=[tower.fixed_unit] * 13, runs=[(8, picture)], start=8)]
        sampling = SamplingParams(
            temperature=1.0,
            top_k=50,
            top_p=0.9,
            repetition_penalty=1.1,
            frequency_penalty=0.5,
            logit_bias={1: 1.0},
            min_tokens=8,
            logprobs=20,
            ignore_eos=True,
            structured={"regex": "a"},
        )
        tokens = [(id * 7 + i) % 1000 for i in range(length or 8 + picture)]
        return Add(id=id, token_ids=tokens, media=media, sampling=sampling, max_tokens=16)

    def _seen_before(self, requests: list[Add], but: int) -> None:
        """Their blocks are in the prefix cache, but for the last tokens."""
        engine, tile = self.engine, self.engine.runner.model.tower
        assert tile is not None and tile.fixed_unit is not None
        pixels = torch.zeros(13 * tile.fixed_unit.num_bytes, dtype=torch.uint8)
        pool, size = engine.scheduler.pool, self.config.block_size
        for request in requests:
            engine.add(request, [pixels for _ in request.media])
            sequence = engine.scheduler.waiting[-1]
            number = (len(sequence.token_ids) - but) // size
            blocks = pool.allocate(number)
            for block, digest in zip(blocks, sequence.digest_blocks(number, size), strict=True):
                pool.register(block, digest)
            pool.release(blocks)

    def _step(self, name: str) -> None:
        memory = self.memory
        memory.peak = memory.now
        self.engine.step()
        self.counted.steps[name] = max(self.counted.steps.get(name, 0), memory.peak - self.base)
        self.counted.peak = max(self.counted.peak, memory.peak + memory.pool)

    def _abort(self) -> None:
        scheduler = self.engine.scheduler
        self.engine.abort([s.id for s in (*scheduler.running, *scheduler.waiting)])
        while self.engine.has_work:
            self.engine.step()
