"""A whole model with random weights, made on the device, that decodes, prefills and encodes as the engine's runner does.

Without scheduler, sampling, messages and checkpoints: one process, and of vlserve only what needs torch, Triton and timm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.sizes import GROUP, TILES, Sizes
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.measure import Difference, difference, recorded
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.formats_int4 import GroupedInt4Format, Int4Storage
from vlserve.llm.int4_packing import AWQ_GEMM
from vlserve.llm.kv_cache import KVCache
from vlserve.llm.tensor_parallel import Split
from vlserve.vision.config import read_encoder_config
from vlserve.vision.image_config import read_image_config
from vlserve.vision.internvit_tower import InternVit

PAGE = 16
TOLERANCE = Difference(0.15, 1.0)  # of logits, between a prompt at once and its last token by itself: all layers' rounding
STEPS = 16


class Model(nn.Module):
    """Tower and decoder, as the engine has them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        config = sizes.config()
        vision = read_encoder_config(config)
        self.decoder = Decoder(read_decoder_config(config["text_config"]), Split())
        self.tower = InternVit(vision, read_image_config({}, vision), sizes.hidden)


def build_model(sizes: Sizes, weights: str, device: torch.device) -> Model:
    """In bfloat16; `weights` is "bf16" or "awq"."""
    with torch.device("meta"):
        model = Model(sizes).to(torch.bfloat16)
        for _, linear in model.decoder.linears() if weights == "awq" else ():
            old = linear.format
            linear.format = GroupedInt4Format(
                old.in_span, old.in_features, old.outputs, Int4Storage(layout=AWQ_GEMM, group=GROUP), torch.bfloat16
            )
    model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data)
    model.decoder.finish()
    model.decoder.prepare(4096, device)
    return model


def _fill(name: str, tensor: torch.Tensor) -> None:
    """Products keep the size of what they are given."""
    if name.endswith(".codes"):
        tensor.random_(0, 256)
    elif name.endswith(".zeros"):
        tensor.fill_(8)
    elif name.endswith(".scales"):
        tensor.fill_((GROUP * tensor.shape[1]) ** -0.5 / 4.6)  # 4.6: the deviation of sixteen codes
    elif tensor.ndim > 1:
        tensor.normal_(0, torch.Size(tensor.shape[1:]).numel() ** -0.5)
    else:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)


class Driver:
    """Steps of `batch` sequences with contexts of up to `longest` tokens, whose earlier keys and values are random numbers."""

    def __init__(self, model: Model, batch: int, longest: int) -> None:
        self.model, self.batch, self.device = model, batch, model.decoder.norm.device
        self.width = -(-longest // PAGE)
        decoder = model.decoder
        self.cache = KVCache(
            decoder.cache_kinds,
            num_blocks=batch * self.width,
            block_size=PAGE,
            dtype=torch.bfloat16,
            device=self.device,
        )
        for layer in self.cache.layers:
            for blocks in layer:
                blocks.normal_()
        self.tables = torch.randperm(batch * self.width).view(batch, self.width)

    def plan(self, start: int, stop: int) -> tuple[torch.Tensor, AttentionMetadata]:
        """Positions, and who attends to what, when tokens start..stop of every sequence are computed; from the host's numbers."""
        places = torch.arange(start, stop)
        slots = (self.tables[:, places // PAGE] * PAGE + places % PAGE).flatten()
        metadata = plan_attention(
            query_lens=(stop - start,) * self.batch,
            context_lens=(stop,) * self.batch,
            block_tables=self.tables.to(self.device),
            slots=slots.to(self.device),
            block_size=PAGE,
        )
        return places.repeat(self.batch).to(self.device), metadata

    @torch.inference_mode()
    def compute(self, ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """ids [B * T] -> logits [B, V] of the last ones."""
        decoder = self.model.decoder
        hidden = decoder(decoder.embed(ids), positions, self.cache, metadata)
        logits = decoder.logits(hidden.unflatten(0, (self.batch, -1))[:, -1])
        assert logits is not None, "there is one rank"
        return logits

    def difference(self) -> Difference:
        """Of the logits behind 40 tokens, computed at once, and the last by itself."""
        ids = torch.randint(0, self.model.decoder.config.vocab_size, (self.batch, 40), device=self.device)
        whole = self.compute(ids.flatten(), *self.plan(0, 40))
        self.compute(ids[:, :39].flatten(), *self.plan(0, 39))
        return difference(self.compute(ids[:, 39], *self.plan(39, 40)), whole)

    def decode_seconds(self, context: int, steps: int = STEPS) -> float:
        """A step as the engine does it: planned on the host, computed, the tokens read; by the clock, the median."""
        ids, taken = torch.zeros(self.batch, dtype=torch.int64, device=self.device), []
        for step in range(-2, steps):
            begun = time.perf_counter()
            ids = self.compute(ids, *self.plan(context - 1, context)).argmax(-1)
            ids.cpu()
            if step >= 0:
                taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    def graph_seconds(self, context: int, steps: int = STEPS) -> float:
        """A step without the host: as a CUDA graph, where it can be one."""
        ids, planned = torch.zeros(self.batch, dtype=torch.int64, device=self.device), self.plan(context - 1, context)
        run = recorded(lambda: self.compute(ids, *planned).argmax(-1))
        return clock(run, self.device, steps)

    def prefill_seconds(self, tokens: int) -> float:
        ids = torch.zeros(self.batch * tokens, dtype=torch.int64, device=self.device)
        return clock(lambda: self.compute(ids, *self.plan(0, tokens)), self.device, 3)


def clock(run: Callable[[], object], device: torch.device, runs: int) -> float:
    """Seconds, the median, by the clock; the first run warms up."""
    taken = []
    for _ in range(1 + runs):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


@torch.inference_mode()
def encode_seconds(model: Model) -> float:
    """A picture through the encoder and the projector."""
    units = [model.tower.fixed_unit] * TILES
    pixels = torch.zeros(sum(unit.num_bytes for unit in units), dtype=torch.uint8)
    return clock(lambda: model.tower.encode(pixels, units), model.decoder.norm.device, 5)


class Transformers:
    """transformers' own decoder of the same widths, in bfloat16, with random weights; raises ImportError where it is not."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

        text = sizes.config()["text_config"]
        config = Qwen2Config(**{key: value for key, value in text.items() if key not in ("model_type", "head_dim")})
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                self.model = Qwen2ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        self.sizes, self.device, self.make_cache = sizes, device, DynamicCache

    @torch.inference_mode()
    def decode_seconds(self, batch: int, context: int, steps: int = 8) -> float:
        cache: Any = self.make_cache()
        for layer in range(self.sizes.layers):
            shape = (batch, self.sizes.kv_heads, context - steps - 2, self.sizes.dim)
            cache.update(*(torch.randn(shape, dtype=torch.bfloat16, device=self.device) for _ in range(2)), layer)
        ids, taken = torch.zeros(batch, 1, dtype=torch.int64, device=self.device), []
        for step in range(-2, steps):
            begun = time.perf_counter()
            ids = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            ids.tolist()
            if step >= 0:
                taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    @torch.inference_mode()
    def prefill_seconds(self, batch: int, tokens: int) -> float:
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device=self.device)
        return clock(lambda: self.model(input_ids=ids, logits_to_keep=1, use_cache=True), self.device, 3)
