"""Planned bytes against counted ones: engines of published sizes on a card that is not there, with tensors without numbers.

`python -m tests.rehearsal.memory` prints them for all of them. The count is that of torch's allocator: each tensor's bytes,
rounded up to 512. What it does not have: the blocks of 2 and 20 MiB in which the allocator asks the driver for memory
(`kSmallBuffer`, `kLargeBuffer` in c10/core/AllocatorConfig.h) and what is lost between them, what putting 4-bit weights in order
takes while they are loaded, the libraries' workspaces, and NCCL's buffers. The driver's share is the plan's allowance.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

from tests.published import PUBLISHED as OF_ALL
from tests.rehearsal.cuda import H100, RTX4090, Card, Rehearsal, install
from tests.rehearsal.launches import Launches
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine, Seat
from vlserve.engine.grammar import Grammar
from vlserve.engine.messages import Add, MediaRef
from vlserve.engine.runner import Runner
from vlserve.errors import ConfigError
from vlserve.kernels import int4_pairs
from vlserve.llm import detect_formats, int4_packing, weights
from vlserve.llm.int4_packing import AWQ
from vlserve.llm.tensor_parallel import Group
from vlserve.models.registry import find_architecture
from vlserve.plan.cuda_graph_sizes import EACH_BYTES, SEGMENT_BYTES, TILE_SIZES, decode_sizes
from vlserve.plan.tp_plan import Plan, make_plan
from vlserve.vision.pixels import Unit

MIB, GIB = 2**20, 2**30
LAYERS = 3  # that steps go through
CARDS = {"80 GB": H100, "24 GB": RTX4090}
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32}
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
    **{
        name: OF_ALL[f"OpenGVLab/{name}-HF"].config | {"tie_word_embeddings": False}  # in a hole, head and embedding are equal
        for name in ("InternVL3_5-30B-A3B", "InternVL3_5-GPT-OSS-20B-A4B-Preview")
    },
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
        return [name for name in self._entries if name != "__metadata__"]

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
        patch.setattr(int4_pairs, "words_of", lambda codes: codes.new_empty(len(codes) // 64, codes.shape[1] // 64, 64, 16))
        with rehearsal.entered():
            yield rehearsal


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one rank, planned or counted."""

    weights: int
    kv_cache: int  # a block for graphs' rows of padding among them
    kv_tokens: int
    graphs: int  # buffers that stay and the pool, without allowances for the driver
    activations: int  # the most beside all of these: a step, pictures' features, the rotary table
    peak: int  # of everything at once


class Trial:
    """An engine of a rank, and what it takes."""

    def __init__(self, card: Rehearsal, folder: Path, tp: int, rank: int = 0, **options: Any) -> None:
        self.memory, self.weights, self.loading = card.memory(), 0, 0
        self.config = EngineConfig(model=str(folder), device="cuda", tp=tp, **options)
        warm_up = Runner.warm_up
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: tp)
            patch.setattr(Runner, "warm_up", lambda runner: (self._shorten(runner), warm_up(runner)))
            self.engine = Engine(self.config, self._stage, seat=Seat(group=OneOf(rank, tp) if tp > 1 else Group()))
        self.engine.grammars.start = lambda structured: Anything()  # type: ignore[method-assign]
        self.fixed = self.memory.now
        self.peaks: dict[str, int] = {}  # by step: the most of everything
        self.activations = 0

    def _shorten(self, runner: Runner) -> None:
        """Steps go through the first layers alone: the others would take the same memory again. They stay where they are."""
        decoder, cache = runner.model.decoder, runner.cache
        encoder = runner.model.tower.encoder  # type: ignore[union-attr]
        self.kept: list[Any] = [decoder.layers, encoder.blocks, cache.layers]
        decoder.layers = torch.nn.ModuleList(list(decoder.layers)[:LAYERS])
        encoder.blocks = type(encoder.blocks)(*list(encoder.blocks)[:LAYERS])
        cache.layers = cache.layers[:LAYERS]

    def _fill_vision_cache(self) -> None:
        """With features of pictures that nobody asks for any more."""
        runner = self.engine.runner
        features = runner.model.decoder.norm.new_zeros(1024, 1, runner.model.decoder.config.hidden_size)
        number = (runner.features.max_bytes - runner.features.num_bytes) // features.nbytes
        with torch.inference_mode():
            for i in range(number):
                runner.features.put((2**200 + i).to_bytes(32, "big"), features.clone())

    def _stage(self, name: str, done: int, total: int) -> None:
        if name == "kv cache":
            self.weights, self.loading = self.memory.now, self.memory.peak

    def run(self) -> Bytes:
        """The largest steps, one after another."""
        engine, most = self.engine, self.config.max_num_seqs
        runner, batch = engine.runner, self.config.max_num_batched_tokens
        ranks = self.config.tp
        self._add([self._request(most + i, TILE_SIZES[-1]) for i in range(ranks)], but=batch // ranks)  # recorded on each rank
        self._steps("a small picture", 2)
        self._abort()
        self._fill_vision_cache()
        whole, rest = divmod(engine.scheduler.most_features // self._tile.num_features, 13)
        number = min(most - 1, whole, runner.num_blocks * runner.block_size // (13 * self._tile.num_features + 64) - 1)
        tiles = [*[13] * number, *[rest] * (rest > 0)]  # as many as a step may have
        self._add([self._request(i, tiles[i]) for i in range(len(tiles))], but=batch // len(tiles))
        self._steps("pictures", 1)
        self._abort()
        self._add([self._request(i, 0, 4) for i in range(most)])
        self._steps("decodes", 3)  # the second is recorded
        self._abort()
        self._add([self._request(0, 0, runner.max_model_len - 8)], but=batch)
        self._steps("a long context", 2)
        self._abort()
        held = runner.device_bytes()
        table = runner.model.decoder.rotary
        assert table is not None
        graphs = self.memory.pool + self.memory.now - self.fixed - held["vision_cache"]
        return Bytes(
            weights=self.weights,
            kv_cache=held["kv_cache"],
            kv_tokens=runner.num_blocks * runner.block_size,
            graphs=graphs,
            activations=self.activations + table.nbytes,
            peak=max(self.peaks.values()),
        )

    @property
    def _tile(self) -> Unit:
        tower = self.engine.runner.model.tower
        assert tower is not None and tower.fixed_unit is not None
        return tower.fixed_unit

    def _request(self, id: int, tiles: int, length: int = 0) -> Add:
        """All that costs memory in sampling; with a picture, which ends its prompt."""
        features = tiles * self._tile.num_features
        media = [MediaRef(digest=bytes([id] * 32), units=[self._tile] * tiles, runs=[(8, features)], start=8)] if tiles else []
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
        tokens = [(id * 7 + i) % 1000 for i in range(length or 8 + features)]
        return Add(id=id, token_ids=tokens, media=media, sampling=sampling, max_tokens=16)

    def _add(self, requests: list[Add], but: int = 2**31) -> None:
        """All but their last tokens are in the prefix cache."""
        scheduler, size = self.engine.scheduler, self.config.block_size
        for request in requests:
            tiles = sum(len(media.units) for media in request.media)
            self.engine.add(request, [torch.zeros(tiles * self._tile.num_bytes, dtype=torch.uint8)] if tiles else [])
            sequence = scheduler.waiting[-1]
            number = max(0, (len(sequence.token_ids) - but) // size)
            blocks = scheduler.pool.allocate(number)
            for block, digest in zip(blocks, sequence.digest_blocks(number, size), strict=True):
                scheduler.pool.register(block, digest)
            scheduler.pool.release(blocks)

    def _steps(self, name: str, number: int) -> None:
        memory, runner = self.memory, self.engine.runner
        for _ in range(number):
            before = memory.now - runner.features.num_bytes
            memory.peak = memory.now
            failed = [event.error for event in self.engine.step() if event.error]
            assert not failed, failed[0]
            self.peaks[name] = max(self.peaks.get(name, 0), memory.peak + memory.pool)
            self.activations = max(self.activations, memory.peak - before)

    def _abort(self) -> None:
        scheduler = self.engine.scheduler
        self.engine.abort([s.id for s in (*scheduler.running, *scheduler.waiting)])
        while self.engine.has_work:
            self.engine.step()


def planned(config: dict[str, Any], card: Card, tp: int, rank: int = 0, **options: Any) -> tuple[Plan, Bytes]:
    plan = make_plan(config, tp=tp, device_memory=card.total_memory / GIB, **options)
    step = EngineConfig(**options)
    one = plan.ranks[rank]
    count = len(decode_sizes(step.max_num_seqs)) + len(TILE_SIZES)
    graphs = one.graph_bytes - count * EACH_BYTES - 2 * SEGMENT_BYTES
    cache = one.kv_bytes_per_token * ((plan.kv_tokens or 0) + step.block_size)
    return plan, Bytes(
        weights=one.vision_bytes + one.decoder_bytes + one.embedding_bytes,
        kv_cache=cache,
        kv_tokens=plan.kv_tokens or 0,
        graphs=graphs,
        activations=one.activation_bytes + one.feature_bytes,
        peak=one.total_bytes - one.graph_bytes + graphs + cache,
    )


def counted(name: str, card: Card, tp: int, rank: int = 0, **options: Any) -> Bytes:
    """Raises ConfigError where the model does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), config_of(name))
        with rehearsed(card) as rehearsal:
            return Trial(rehearsal, path, tp, rank, **options).run()


def main() -> None:
    """A line for each model, degree and card, as the table in docs/serving.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("models", nargs="*", default=[*PUBLISHED, *(f"{name}-AWQ" for name in PUBLISHED)])
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 2, 4, 8])
    options = parser.parse_args()
    print("| model | tp | card | | weights | graphs | activations, features | in all with KV cache | KV tokens |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for tp in options.tp:
            for label, card in CARDS.items():
                print("\n".join(_lines(name, tp, label, card)), flush=True)


def _lines(name: str, tp: int, label: str, card: Card) -> Iterator[str]:
    plan = make_plan(config_of(name), tp=tp, device_memory=card.total_memory / GIB)
    head = f"| {name} | {tp} | {label} |"
    if not plan.ranks:
        return  # a degree that does not divide the heads
    try:
        found = counted(name, card, tp)
    except ConfigError as error:
        same = "as planned" if str(error) == plan.reason else f"planned: {plan.reason}"
        yield f"{head} does not fit | {str(error).partition(';')[0]} | {same} |||"
        return
    for kind, one in (("planned", planned(config_of(name), card, tp)[1]), ("counted", found)):
        sizes = (one.weights, one.graphs, one.activations, one.peak)
        yield f"{head} {kind} | {' | '.join(f'{size / MIB:,.1f}' for size in sizes)} | {one.kv_tokens:,} |"


if __name__ == "__main__":
    main()
