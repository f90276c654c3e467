"""The operations of models at their full size, on tensors without numbers: what they launch is what a real model launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.rehearsal.operations import Place
from vlserve.kernels.attention import paged_attention, plan_attention
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.head import head_matmul, int8_matmul
from vlserve.kernels.int4_pairs import PairedWeights
from vlserve.kernels.int4_pairs import triton as pairs_triton
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks
from vlserve.kernels.norms import add_rms_norm, add_scaled_norm, layer_norm, rms_norm
from vlserve.kernels.rotary import rotary_store
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.types import Draw

TOKENS, SEQUENCES, PAGE = 16384, 256, 16  # the most of a step
CACHE = 30 * 2**30  # bytes of a layer's keys: a card's whole memory for few layers


@dataclass(frozen=True, kw_only=True)
class Model:
    """Of its published config.json. `of_units`: width of the vision encoder."""

    width: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    of_units: int
    has_norms: bool = False  # of queries and keys
    vocab: int = 151674


INTERNVL3_1B = Model(width=896, heads=14, kv_heads=2, dim=64, inner=4864, of_units=1024)
INTERNVL3_8B = Model(width=3584, heads=28, kv_heads=4, dim=128, inner=18944, of_units=1024)
INTERNVL3_38B = Model(width=5120, heads=40, kv_heads=8, dim=128, inner=27648, of_units=3200)
INTERNVL3_78B = Model(width=8192, heads=64, kv_heads=8, dim=128, inner=29568, of_units=3200)
INTERNVL3_5_8B = Model(width=4096, heads=32, kv_heads=8, dim=128, inner=12288, of_units=1024, has_norms=True, vocab=151936)


def there(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of the rehearsed device, with no memory."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return Place(shape, tuple(reversed(strides)), 0, dtype).made()


def encode(model: Model, dtype: torch.dtype) -> None:
    """A block of the vision encoder, for as many tiles as a prompt has at most."""
    x, c = there(dtype, 40, 1025, model.of_units), there(dtype, model.of_units)
    if model.of_units == 3200:
        rms_norm(x, c, 1e-6)
        add_scaled_norm(x, x, c, c, None, 1e-6)
        rms_norm(there(dtype, 40, 1025, 3 * 3200)[..., 3200:6400], c, 1e-6)  # of queries and keys, over all heads
    else:
        layer_norm(x, c, c, 1e-6)
        add_scaled_norm(x, x, c, c, c, 1e-6)


def decode(model: Model, dtype: torch.dtype, rows: int, group: int | None) -> None:
    """A decoder layer but attention, with 4-bit weights in groups of `group`."""
    x, c = there(dtype, rows, model.width), there(dtype, model.width)
    qkv = _weights(model.width, (model.heads + 2 * model.kv_heads) * model.dim, group, dtype) if group else None
    up = _weights(model.width, 2 * model.inner, group, dtype) if group else None
    down = _weights(model.inner, model.width, group, dtype) if group else None
    sums = [None if weights is None or rows > 128 else weights.empty_sums(x) for weights in (qkv, up, down)]
    rms_norm(x, c, 1e-6, sums[0])
    add_rms_norm(x, x, c, 1e-6, sums[1])
    gated = silu_mul(there(dtype, rows, 2 * model.inner), sums[2])
    if qkv is not None and up is not None and down is not None:
        attended = there(dtype, rows, model.heads * model.dim)
        if rows <= 128:
            out = _weights(model.heads * model.dim, model.width, group or 0, dtype)
            group_sums(attended, out.empty_sums(attended))
        for weights, given, of_given in zip((qkv, up, down), (x, x, gated), sums, strict=True):
            if rows <= 128:
                weights.matmul(given, of_given)
            else:  # torch's product with what is spread out
                pairs_triton.pairs_dequantize_triton(weights)


def attend(model: Model, dtype: torch.dtype, kind: torch.dtype | None, window: int | None = None) -> None:
    """Decodes with contexts of 100 and 20000 tokens, a prompt of 2048, and its second chunk behind 100000 tokens."""
    itemsize = 1 if kind else dtype.itemsize
    shape = CACHE // (PAGE * model.kv_heads * model.dim * itemsize), PAGE, model.kv_heads, model.dim
    for query_lens, context_lens in (((1, 1), (100, 20000)), ((2048,), (2048,)), ((2048,), (102048,))):
        tokens = sum(query_lens)
        caches = _cache(shape, dtype, kind), _cache(shape, dtype, kind)
        heads = model.heads + 2 * model.kv_heads
        query, key, value = there(dtype, tokens, heads, model.dim).split([model.heads, model.kv_heads, model.kv_heads], 1)
        turned = there(torch.float32, tokens, 2, model.dim // 2)
        norm = there(dtype, model.dim)
        slots = there(torch.int64, tokens)
        norms = (norm, norm) if model.has_norms else None
        query = rotary_store(query, key, value, (turned[:, 0], turned[:, 1]), caches, slots, norms, 1e-6)
        tables = there(torch.int64, len(query_lens), -(-max(context_lens) // PAGE))
        plan = plan_attention(query_lens=query_lens, context_lens=context_lens, block_tables=tables, slots=slots, block_size=PAGE)
        paged_attention(query, *caches, plan, model.dim**-0.5, window=window)


def sample(model: Model, dtype: torch.dtype) -> None:
    """The head, in 16 and in 8 bits, and draws."""
    codes, scales = there(torch.int8, model.vocab, model.width), there(torch.float32, model.vocab)
    for rows in (1, SEQUENCES):
        x = there(dtype, rows, model.width)
        head_matmul(x, there(dtype, model.vocab, model.width))
        int8_matmul(x, codes, scales)
    logits = there(torch.float32, SEQUENCES, model.vocab)
    draws = [Draw(row=1, temperature=1.0, top_k=4, seed=3, number=2), Draw(row=2, temperature=1.0, seed=3, number=2)]
    draw_tokens(logits, there(torch.int64, SEQUENCES), draws)


def _cache(shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype | None) -> Blocks:
    return there(dtype, *shape) if kind is None else QuantizedBlocks(there(kind, *shape), there(torch.bfloat16, *shape[:-1]))


def _weights(inputs: int, outputs: int, group: int, dtype: torch.dtype) -> PairedWeights:
    tiles, blocks = -(-outputs // 64), -(-inputs // 128)
    groups = blocks * 128 // group
    return PairedWeights(
        words=there(torch.int32, tiles, blocks, 64, 16),
        scales=there(dtype, tiles, groups, 64),
        zeros=there(torch.uint8, tiles, groups, 64),
        inputs=inputs,
        outputs=outputs,
    )
