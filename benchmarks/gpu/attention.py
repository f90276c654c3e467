"""Paged attention: decode steps and prefill chunks, over caches in 16 and in eight bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu import rivals
from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.counted import KINDS as TYPES
from benchmarks.gpu.counted import counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.sizes import KINDS, Sizes, Work, cache_bytes
from vlserve.kernels.attention import paged_attention, plan_attention
from vlserve.kernels.attention.launch import Schedule, Tiling, choose_chunk, choose_tiling, looked_at, make_schedule
from vlserve.kernels.attention.reference import paged_attention_ref
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.cpu import quantize
from vlserve.kernels.kv_cache.types import CODE_TYPES, Blocks, QuantizedBlocks
from vlserve.kernels.measure import Difference

PAGE = 16  # tokens of a block
COUNTED = "group 7"  # other groups' loops differ by little
DECODES = ((1, 4096), (8, 2048), (64, 1024))  # batch, context
PREFILLS = ((2048, 2048), (512, 4096))  # query tokens, context
TOLERANCE = Difference(8e-3, 0.3)  # weights are rounded too; and the first rows of a prompt are larger than most by far


def attention_cases(sizes: Sizes, *, quick: bool = False) -> Iterator[Case]:
    for kind in KINDS:
        for batch, context in DECODES[::2] if quick else DECODES:
            yield attention(sizes, batch, 1, context, kind)
        for query_len, context in PREFILLS[:1] if quick else PREFILLS:
            yield attention(sizes, 1, query_len, context, kind)


def attention(sizes: Sizes, batch: int, query_len: int, context: int, kind: str) -> Case:
    """`batch` sequences with `query_len` queries each in contexts of so many tokens."""

    def plan(arch: int, multiprocessors: int) -> str:
        tiling, _, found = schedule(sizes, batch, query_len, context, kind, arch, multiprocessors)
        text = f"{len(found.items) * sizes.kv_heads} programs of {tiling.rows} rows, {tiling.positions} positions"
        return f"{text}, {tiling.num_warps} warps, {'merged' if found.merges else 'not cut'}"

    return Case(
        model=sizes.name,
        kernel=f"attention {'decode' if query_len == 1 else 'prefill'}, cache {kind}",
        shape=f"{batch} x {query_len} of {context}" if query_len > 1 else f"batch {batch}, context {context}",
        work=least_work(sizes, batch, query_len, context, kind),
        plan=plan,
        kernels=lambda card: attention_kernels(sizes, batch, query_len, context, kind, card),
        build=lambda device: build(sizes, batch, query_len, context, kind, device),
        tolerance=TOLERANCE,
    )


def least_work(sizes: Sizes, batch: int, query_len: int, context: int, kind: str) -> Work:
    seen = query_len * (context - query_len) + query_len * (query_len + 1) // 2  # positions that a head's queries see
    each = context * cache_bytes(sizes.kv_heads, sizes.dim, kind) + 4 * query_len * sizes.heads * sizes.dim
    return Work(batch * each, 4 * batch * seen * sizes.heads * sizes.dim)


def schedule(
    sizes: Sizes, batch: int, query_len: int, context: int, kind: str, arch: int, multiprocessors: int
) -> tuple[Tiling, int, Schedule]:
    """Tiling, positions of a part, and what is launched."""
    itemsize = 2 if kind == "auto" else 1
    tiling = choose_tiling(query_len, sizes.heads // sizes.kv_heads, sizes.dim, itemsize, arch)
    lengths = [stop for _ in range(batch) for stop in looked_at(query_len, context, tiling.tokens)]
    tile_bytes = 2 * tiling.positions * sizes.dim * itemsize
    chunk = choose_chunk(
        *(lengths, sizes.kv_heads),
        tile=tiling.positions,
        tile_bytes=tile_bytes,
        num_sms=multiprocessors,
        longest_first=query_len > 1,
    )
    sequences = [(i, i * query_len, query_len, context) for i in range(batch)]
    positions = chunk * tiling.positions
    return tiling, positions, make_schedule(sequences, tokens=tiling.tokens, chunk=positions)


def attention_kernels(sizes: Sizes, batch: int, query_len: int, context: int, kind: str, card: Card) -> list[Kernel]:
    """The attention, and the merge of the parts of those contexts that are cut."""
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.dim
    work = least_work(sizes, batch, query_len, context, kind)
    tiling, part, _ = schedule(sizes, batch, query_len, context, kind, card.arch, card.multiprocessors)
    name = "attention, decode" if query_len == 1 else "attention, prefill"
    code = counted(name, TYPES[kind], f"dim {dim}, page {PAGE}, {COUNTED}", card.architecture)
    stops = looked_at(query_len, context, tiling.tokens)
    counts = [-(-stop // part) for stop in stops]  # parts of each Q-block
    merged = [count for count in counts if count > 1]
    positions, rows = batch * kv_heads * sum(stops), batch * kv_heads * tiling.tokens * (heads // kv_heads)
    each = 2 * dim * (2 if kind == "auto" else 1)  # bytes of a position's keys and values
    parts = 4 * rows * sum(merged) * (dim + 1)  # bytes
    main = Kernel(
        bytes=work.bytes,
        flops=work.flops,
        instructions=code.per_number * 2 * dim * positions,
        through_l2=each * positions + parts,
        waits=5,  # the item, its sequence, the table, the keys, and what is written
        grid=Grid(
            programs=batch * kv_heads * sum(counts),
            ahead=(tiling.num_stages - 1) // 2 * tiling.positions * each,  # a tile takes two stages
            warps=tiling.num_warps,
            counted=code,
            longest_first=query_len > 1,
        ),
    )
    if not merged:
        return [main]
    code = counted("attention, merge", "bf16", "dim 128", card.architecture)  # the only one in the table
    grid = Grid(programs=rows * len(merged), ahead=2 * dim, warps=4, counted=code)
    return [main, Kernel(bytes=2 * dim * grid.programs, through_l2=parts, waits=5, grid=grid)]


def build(sizes: Sizes, batch: int, query_len: int, context: int, kind: str, device: torch.device) -> Built:
    kv_heads, dim, scale = sizes.kv_heads, sizes.dim, sizes.dim**-0.5
    pages = -(-context // PAGE)
    tables = torch.randperm(batch * pages, device=device).view(batch, pages)
    places = torch.arange(context - query_len, context, device=device)
    metadata = plan_attention(
        query_lens=(query_len,) * batch,
        context_lens=(context,) * batch,
        block_tables=tables,
        slots=(tables[:, places // PAGE] * PAGE + places % PAGE).flatten(),
        block_size=PAGE,
    )
    shape = (batch * pages, PAGE, kv_heads, dim)
    numbers = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
    caches: list[Blocks] = [QuantizedBlocks(*quantize(n, CODE_TYPES[kind])) if kind != "auto" else n for n in numbers]
    query = torch.randn(batch * query_len, sizes.heads, dim, device=device).bfloat16()

    def others() -> Iterator[Callable[[], Rival]]:
        if kind == "auto":
            keys, values = (n[tables].flatten(1, 2)[:, :context] for n in numbers)
            make = rivals.sdpa_decode if query_len == 1 else rivals.sdpa_prefill
            yield lambda: make(query, keys, values, scale)
            yield lambda: rivals.flashinfer(query, (numbers[0], numbers[1]), metadata)

    return Built(
        run=lambda: paged_attention(query, caches[0], caches[1], metadata, scale),
        want=lambda: defined(query, caches, metadata, scale),
        rivals=others,
    )


def defined(query: torch.Tensor, caches: list[Blocks], metadata: AttentionMetadata, scale: float) -> torch.Tensor:
    """In float64, a sequence at a time with its own blocks."""
    found, start = [], 0
    for table, query_len, context in zip(metadata.block_tables, metadata.query_lens, metadata.context_lens, strict=True):
        own = [
            QuantizedBlocks(cache.codes[table], cache.scales[table]) if isinstance(cache, QuantizedBlocks) else cache[table]
            for cache in caches
        ]
        alone = AttentionMetadata(
            query_lens=(query_len,),
            context_lens=(context,),
            block_tables=torch.arange(len(table), device=table.device)[None],
            slots=metadata.slots[start : start + query_len],
            block_size=metadata.block_size,
            decodes=(),
            prefills=(),
        )
        found.append(paged_attention_ref(query[start : start + query_len].double(), own[0], own[1], alone, scale))
        start += query_len
    return torch.cat(found)
