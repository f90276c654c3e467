"""`paged_attention` on a GPU: one kernel for prefill chunks and decode steps, and one that merges the parts of long contexts.

A program takes a tile of rows, which are query tokens of one sequence times the G query heads of one KV head, and goes over
a chunk of the context in tiles of positions: those that all rows see without a mask, then the rest. Scores are in units of
log2. Keys and values in eight bits become numbers of the query's type, and their scales go to the scores and weights. A
head's sink joins the sum of weights at the end: of a program that sees its Q-block's whole context, or of the merge.
Which program does what is plan.py's. Shapes: as in reference.py; P items, R rows of a Q-block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.attention.launch import padded
from vlserve.kernels.attention.plan import Launch, plan_launches
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.triton import number_of_bits, numbers_of_pairs, reads_e4m3
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks
from vlserve.kernels.with_triton import check_contiguous

COLUMNS = tl.constexpr(5)  # of a sequence in the schedule
MERGED_AT_ONCE = 16  # parts


def paged_attention_triton(
    query: torch.Tensor,
    key_cache: Blocks,
    value_cache: Blocks,
    metadata: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """As `paged_attention_ref` for a `scale` above 0: scores and sums in float32, products of the query's type.

    Args:
        num_sms: multiprocessors to plan for, the device's by default.
    """
    query = query.contiguous()
    out = torch.empty_like(query)
    for launch in plan_launches(metadata, query, key_cache, num_sms):
        _run(launch, out, query, key_cache, value_cache, scale, window or 0, sinks)
    return out


def _run(
    launch: Launch,
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: Blocks,
    value_cache: Blocks,
    scale: float,
    window: int,
    sinks: torch.Tensor | None,
) -> None:
    tiling = launch.tiling
    (heads, dim), kv_heads = query.shape[1:], key_cache.shape[2]
    group = heads // kv_heads
    caches = [key_cache, value_cache]
    is_coded = isinstance(key_cache, QuantizedBlocks)
    is_e4m3 = isinstance(key_cache, QuantizedBlocks) and key_cache.codes.dtype is torch.uint8
    codes = [cache.codes.view(torch.int16) if isinstance(cache, QuantizedBlocks) else cache for cache in caches]
    scales = [cache.scales.view(torch.int16) if isinstance(cache, QuantizedBlocks) else None for cache in caches]
    check_contiguous(keys=codes[0], key_scales=scales[0], values=codes[1], value_scales=scales[1])
    check_contiguous(tables=launch.tables, schedule=launch.schedule, sinks=sinks)
    rows = tiling.tokens * group
    num_parts = launch.num_items * kv_heads * rows if launch.num_merges else 0
    parts = torch.empty(num_parts, dim + 1, dtype=torch.float32, device=query.device)
    results, logs = parts.view(-1)[: num_parts * dim], parts.view(-1)[num_parts * dim :]
    sizes = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "DIM": dim,
        "DIM_PADDED": padded(dim, is_coded=is_coded),
        "TOKENS": tiling.tokens,
        "WINDOW": window,
    }
    with torch.cuda.device_of(query):
        _attention_kernel[(launch.num_items * kv_heads,)](
            *(out, results, logs, query, codes[0], scales[0], codes[1], scales[1], launch.tables, launch.schedule, sinks),
            *(launch.num_sequences, launch.tables.shape[1], launch.chunk_at, scale),
            **sizes,
            PAGE=key_cache.shape[1],
            ROWS=tiling.rows,
            TILE=tiling.positions,
            IS_CODED=is_coded,
            IS_E4M3=is_e4m3,
            IS_NATIVE=is_e4m3 and reads_e4m3(query),
            LIFT=6 if is_coded and query.dtype is torch.float16 else 0,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            maxnreg=tiling.most_registers(is_coded=is_coded, has_sinks=sinks is not None, window=window),
        )
        if launch.num_merges:
            _merge_kernel[(launch.num_merges * kv_heads * rows,)](
                *(out, results, logs, launch.schedule, sinks, launch.num_sequences, launch.num_items, launch.chunk_at),
                **sizes,
                TILE=tiling.positions,
                PARTS=MERGED_AT_ONCE,
            )


@triton.jit
def _find(schedule, item, place, TOKENS: tl.constexpr):
    """Of an item of the sequence at `place`: sequence, first query token, query_len, tokens of its context before the queries;
    within the sequence its first token, the end of what its Q-block looks at, its part, and how many Q-blocks there are."""
    entry = schedule + place * COLUMNS
    nth = item - tl.load(entry)
    query_len, context_len = tl.load(entry + 3), tl.load(entry + 4)
    num_blocks = (query_len + TOKENS - 1) // TOKENS
    part = nth // num_blocks
    token = (num_blocks - 1 - nth % num_blocks) * TOKENS  # the last tokens see most: theirs is the longest work, so it is first
    before = context_len - query_len
    stop = before + tl.minimum(token + TOKENS, query_len)
    return tl.load(entry + 1), tl.load(entry + 2), query_len, before, token, stop, part, num_blocks


@triton.jit
def _load_tile(
    cache, places, is_there,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """[TILE, WIDTH_PADDED] from places [TILE] int64, in slots of STRIDE elements."""
    d = tl.arange(0, WIDTH_PADDED)
    pointers = cache + places[:, None] * STRIDE + d[None, :]
    if IS_TAIL:
        return tl.load(pointers, mask=is_there[:, None] & (d < WIDTH)[None, :], other=0)
    elif WIDTH < WIDTH_PADDED:
        return tl.load(pointers, mask=(d < WIDTH)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _add_tile(
    highest, total, result, odd_result, q, odd_q, seen, at, end, scale, keys, key_scales, values, value_scales, table,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    IS_CODED: tl.constexpr, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr, LIFT: tl.constexpr, WINDOW: tl.constexpr,
    IS_TAIL: tl.constexpr,
):  # fmt: skip
    """Positions at..at+TILE, of which rows see those up to `seen`, within the window; in the tail only those below `end` are
    there."""
    lane = tl.arange(0, TILE)
    is_there = at + lane < end
    if PAGE % TILE == 0:
        places = tl.load(table + at // PAGE).to(tl.int64) * PAGE + (at % PAGE + lane)
    else:
        if TILE % PAGE == 0:
            page, slot = at // PAGE + lane // PAGE, lane % PAGE
        else:
            page, slot = (at + lane) // PAGE, (at + lane) % PAGE
        if IS_TAIL:
            places = tl.load(table + page, mask=is_there, other=0).to(tl.int64) * PAGE + slot
        else:
            places = tl.load(table + page).to(tl.int64) * PAGE + slot
    k = _load_tile(keys, places, is_there, KV_HEADS * WIDTH, WIDTH, WIDTH_PADDED, IS_TAIL)
    if IS_CODED:
        even, odd = numbers_of_pairs(k, q.dtype, IS_E4M3, IS_NATIVE)
        scores = tl.dot(q, tl.trans(even), input_precision="ieee")
        scores = tl.dot(odd_q, tl.trans(odd), scores, input_precision="ieee")
        scores *= (_load_scales(key_scales, places * KV_HEADS, is_there, IS_TAIL) * scale)[None, :]
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if IS_TAIL:
        is_seen = is_there[None, :] & (at + lane[None, :] <= seen[:, None])
        if WINDOW:
            is_seen = is_seen & (at + lane[None, :] > seen[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = higher
    if IS_TAIL:  # a row may have seen nothing yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights, shrunk = tl.exp2(scores - (base - LIFT)[:, None]), tl.exp2(highest - base)
    total = total * shrunk + tl.sum(weights, 1)
    v = _load_tile(values, places, is_there, KV_HEADS * WIDTH, WIDTH, WIDTH_PADDED, IS_TAIL)
    if IS_CODED:
        even, odd = numbers_of_pairs(v, q.dtype, IS_E4M3, IS_NATIVE)
        weights = (weights * _load_scales(value_scales, places * KV_HEADS, is_there, IS_TAIL)[None, :]).to(q.dtype)
        result = tl.dot(weights, even, result * shrunk[:, None], input_precision="ieee")
        odd_result = tl.dot(weights, odd, odd_result * shrunk[:, None], input_precision="ieee")
    else:
        result = tl.dot(weights.to(q.dtype), v, result * shrunk[:, None], input_precision="ieee")
    return higher, total, result, odd_result


@triton.jit
def _load_scales(scales, places, is_there, IS_TAIL: tl.constexpr):
    if IS_TAIL:
        return number_of_bits(tl.load(scales + places, mask=is_there, other=0))
    else:
        return number_of_bits(tl.load(scales + places))


@triton.jit(do_not_specialize=["num_sequences", "table_width", "chunk_at"])
def _attention_kernel(
    out, results, logs, query, keys, key_scales, values, value_scales, tables, schedule, sinks,
    num_sequences, table_width, chunk_at, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    IS_CODED: tl.constexpr, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """One program an item and KV head; items below 0 are idle. LIFT: the weights' exponents are higher by it, so that in float16
    their products with scales do not vanish; it leaves the result as it is. WINDOW: tokens that a token sees, itself counted; 0
    for all. What no row of a program sees is passed over in whole tiles, and a part of the context of which nothing is seen
    weighs nothing."""
    EACH: tl.constexpr = 2 if IS_CODED else 1  # numbers of an element of the cache
    WIDTH: tl.constexpr = DIM // EACH
    WIDTH_PADDED: tl.constexpr = DIM_PADDED // EACH
    item, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    place = tl.load(schedule + num_sequences * COLUMNS + item)
    if place < 0:
        return
    chunk = tl.load(schedule + chunk_at)
    sequence, start, query_len, before, first, stop, part, _ = _find(schedule, item, place, TOKENS)
    begin = part * chunk * TILE
    if begin >= stop:
        return
    end = tl.minimum(begin + chunk * TILE, stop)
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH_PADDED)
    token = first + row // GROUP
    is_row = (row < TOKENS * GROUP) & (token < query_len)
    is_number = is_row[:, None] & (d < WIDTH)[None, :]
    places = ((start + token).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP)[:, None] * DIM + EACH * d[None, :]
    q = tl.load(query + places, mask=is_number, other=0.0)
    seen = before + token  # the last position that the row looks at
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, WIDTH_PADDED), tl.float32)
    if IS_CODED:
        odd_q = tl.load(query + places + 1, mask=is_number, other=0.0)
        odd_result = tl.zeros((ROWS, WIDTH_PADDED), tl.float32)
        key_scales += head
        value_scales += head
    else:
        odd_q = 0
        odd_result = 0
    keys += head * WIDTH
    values += head * WIDTH
    table = tables + sequence.to(tl.int64) * table_width
    scale *= 1.4426950408889634
    if WINDOW:
        begin += tl.maximum(before + first + 1 - WINDOW - begin, 0) // TILE * TILE  # where the first row's window begins
    tail = begin + tl.maximum(tl.minimum(end, before + first + 1) - begin, 0) // TILE * TILE  # all rows see what is before
    if WINDOW:  # up to where the last row's begins
        inside = tl.minimum(begin + (tl.maximum(stop - WINDOW - begin, 0) + TILE - 1) // TILE * TILE, tail)
        for at in tl.range(begin, inside, TILE):
            highest, total, result, odd_result = _add_tile(
                highest, total, result, odd_result, q, odd_q, seen, at, end, scale,
                keys, key_scales, values, value_scales, table,
                KV_HEADS, WIDTH, WIDTH_PADDED, PAGE, TILE, IS_CODED, IS_E4M3, IS_NATIVE, LIFT, WINDOW, True,
            )  # fmt: skip
        begin = inside
    for at in tl.range(begin, tail, TILE):
        highest, total, result, odd_result = _add_tile(
            highest, total, result, odd_result, q, odd_q, seen, at, end, scale,
            keys, key_scales, values, value_scales, table,
            KV_HEADS, WIDTH, WIDTH_PADDED, PAGE, TILE, IS_CODED, IS_E4M3, IS_NATIVE, LIFT, WINDOW, False,
        )  # fmt: skip
    for at in tl.range(tail, end, TILE):
        highest, total, result, odd_result = _add_tile(
            highest, total, result, odd_result, q, odd_q, seen, at, end, scale,
            keys, key_scales, values, value_scales, table,
            KV_HEADS, WIDTH, WIDTH_PADDED, PAGE, TILE, IS_CODED, IS_E4M3, IS_NATIVE, LIFT, WINDOW, True,
        )  # fmt: skip
    is_whole = stop <= chunk * TILE
    if sinks is not None:  # noqa: SIM102  (known when it is compiled)
        if is_whole:
            total += tl.exp2(_load_sinks(sinks, head * GROUP + row % GROUP) - highest + LIFT)
    total = tl.where(total == 0.0, 1.0, total)  # a row that has seen nothing: its logarithm stays -inf
    shares = 1.0 / total[:, None]
    parts = tl.program_id(0).to(tl.int64) * (TOKENS * GROUP) + row
    part_places = parts[:, None] * DIM + EACH * d[None, :]
    _store(out, places, results, part_places, result * shares, is_number, is_whole)
    if IS_CODED:
        _store(out, places + 1, results, part_places + 1, odd_result * shares, is_number, is_whole)
    if not is_whole:
        tl.store(logs + parts, highest - LIFT + tl.log2(total), mask=is_row)


@triton.jit
def _load_sinks(sinks, heads):
    """In units of log2."""
    return tl.load(sinks + heads) * 1.4426950408889634


@triton.jit
def _store(out, places, results, part_places, result, is_number, is_whole):
    if is_whole:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=is_number)
    else:
        tl.store(results + part_places, result, mask=is_number)


@triton.jit(do_not_specialize=["num_sequences", "num_items", "chunk_at"])
def _merge_kernel(
    out, results, logs, schedule, sinks, num_sequences, num_items, chunk_at,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a row of a Q-block that is cut and KV head; idle ones as above."""
    row, head = tl.program_id(0) % (TOKENS * GROUP), tl.program_id(0) // (TOKENS * GROUP) % KV_HEADS
    merge = tl.program_id(0) // (TOKENS * GROUP * KV_HEADS)
    item = tl.load(schedule + num_sequences * COLUMNS + num_items + merge)
    if item < 0:
        return
    chunk = tl.load(schedule + chunk_at)
    entry = tl.load(schedule + num_sequences * COLUMNS + item)
    _, start, query_len, _, first, stop, _, num_blocks = _find(schedule, item, entry, TOKENS)
    token = first + row // GROUP
    if stop <= chunk * TILE or token >= query_len:
        return
    d = tl.arange(0, DIM_PADDED)
    highest, total = float("-inf"), 0.0
    result = tl.zeros((DIM_PADDED,), tl.float32)
    for at in tl.range(0, (stop + chunk * TILE - 1) // (chunk * TILE), PARTS):
        part = at + tl.arange(0, PARTS)
        is_part = part * (chunk * TILE) < stop
        places = ((item + part * num_blocks) * KV_HEADS + head).to(tl.int64) * (TOKENS * GROUP) + row
        log = tl.load(logs + places, mask=is_part, other=float("-inf"))
        some = tl.load(results + places[:, None] * DIM + d[None, :], mask=is_part[:, None] & (d < DIM)[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(log, 0))  # every row sees the first part, where there is no window
        base = higher
        if WINDOW:
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, shrunk = tl.exp2(log - base), tl.exp2(highest - base)
        total = total * shrunk + tl.sum(weights, 0)
        result = result * shrunk + tl.sum(some * weights[:, None], 0)
        highest = higher
    if sinks is not None:
        total += tl.exp2(_load_sinks(sinks, head * GROUP + row % GROUP) - highest)
    place = (start + token).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
    tl.store(out + place * DIM + d, (result / total).to(out.dtype.element_ty), mask=d < DIM)
