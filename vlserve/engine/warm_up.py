"""What is launched before the first request: every one of Triton's kernels that serving can need, so that none is compiled within
a request, where all others would wait for it.

A kernel is compiled for the sizes of its tiles, which go by the tokens of a step, for types, and for whether tensors and numbers
are aligned to 16. Tensors and numbers that differ from step to step are aligned, or not looked at (`do_not_specialize`).
Shapes: T tokens, R rows.
"""

from __future__ import annotations

import torch

from vlserve.engine.cuda_graphs import attention_shapes
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.attention.launch import MOST_ROWS, Tiling
from vlserve.kernels.attention.plan import Shape, plan_cut
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.types import Draw
from vlserve.llm.decoder import Decoder
from vlserve.llm.experts import Experts
from vlserve.llm.formats_int4 import GroupedInt4Format
from vlserve.llm.kv_cache import KVCache

ROWS = (1, 17, 33)  # of the head: one more than each size of its tiles but the last


def warm_up_decoder(decoder: Decoder, cache: KVCache, *, most_tokens: int, most_rows: int, max_model_len: int) -> None:
    """Steps of a prefill each, into blocks that nobody has yet; all ranks do it together.

    Args:
        most_tokens: of a step. A step of so many has been done. most_rows: that sample.
    """
    cache.clear([0])  # which every context is read from
    shapes = attention_shapes(decoder, cache)
    for number in _lengths(shapes, min(most_tokens, max_model_len)):
        hidden = _step(decoder, cache, shapes, number)
    for number in (number for number in ROWS if number <= most_rows):
        logits = decoder.logits(hidden[:1].expand(number, -1).contiguous())
    for linear in _four_bits(decoder):
        linear.launch_all()
    for experts in _experts(decoder):
        experts.launch_all(most_tokens)
    if logits is not None:  # on rank 0
        draw_tokens(logits, logits.argmax(-1), [Draw(row=0, temperature=1.0, top_k=1, seed=0, number=0)])


def _lengths(shapes: list[Shape], most_tokens: int) -> list[int]:
    """Tokens of prefills that are cut into every kind of tiles."""
    first: dict[tuple[Tiling, ...], int] = {}
    for number in range(1, 1 + min(most_tokens, MOST_ROWS)):
        first.setdefault(tuple(shape.tiling(number) for shape in shapes), number)
    return list(first.values())


def _step(decoder: Decoder, cache: KVCache, shapes: list[Shape], number: int) -> torch.Tensor:
    """Hidden states [T, C] of the last tokens of a context that attention cuts, all of whose blocks are the first: a graph merges
    parts also where no context is so long."""
    device = decoder.norm.device
    context = max([number, *(2 * shape.tiling(number).positions for shape in shapes)])
    places = torch.arange(number, device=device)
    metadata = plan_attention(
        query_lens=(number,),
        context_lens=(context,),
        block_tables=torch.zeros(1, -(-context // cache.block_size), dtype=torch.int64, device=device),
        slots=places,
        block_size=cache.block_size,
    )
    for shape in shapes:
        plan_cut(metadata, shape)
    axes = places.expand(decoder.num_position_axes, -1)
    return decoder(decoder.embed(torch.zeros_like(places)), axes, cache, metadata)


def _four_bits(decoder: Decoder) -> list[GroupedInt4Format]:
    """One of each shape."""
    found: dict[tuple[int, ...], GroupedInt4Format] = {}
    for _, linear in decoder.linears():
        if isinstance(of := linear.format, GroupedInt4Format):
            found[of.size, of.group, sum(span.size for span, _ in of.outputs.values())] = of
    return list(found.values())


def _experts(decoder: Decoder) -> list[Experts]:
    """Of one layer of each shape."""
    found: dict[object, Experts] = {}
    for layer in decoder.decoder_layers:
        if isinstance(experts := layer.feed_forward, Experts):
            found[experts.shape] = experts
    return list(found.values())
