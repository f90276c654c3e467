"""CUDA graphs of decode steps and of the vision encoder: for which sizes, and the memory that is set aside for them.

A step or a picture is padded to the next size. The bytes are kept free when the KV cache is sized, and no graph is made once
they are used up. No torch here: `vlserve plan` counts them too.
"""

from __future__ import annotations

from vlserve.plan.footprint import Shard, Step, dense_width, experts_peak, tile_bytes
from vlserve.plan.model_shape import ModelShape

MOST_ROWS = 128  # of a decode step; larger ones give the device enough to do while the host launches kernels
TILE_SIZES = (1, 2, 3, 4, 6)  # tiles of a picture; more keep the device busy by themselves
MIB = 2**20
EACH_BYTES = 8 * MIB  # a graph's own: an allowance, for the driver says it only once the graph is made
SEGMENT_BYTES = 20 * MIB  # in which torch takes memory for a pool; one is begun that is not full
INT32, INT64, FLOAT32 = 4, 8, 4  # bytes


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then by eight, up to what one step may have; the last one holds the largest step."""
    last = min(max_num_seqs, MOST_ROWS)
    sizes = [size for size in (1, 2, 4, *range(8, MOST_ROWS + 1, 8)) if size < last]
    return (*sizes, last)


def next_size(sizes: tuple[int, ...], number: int) -> int | None:
    """The smallest that holds `number`; None where none does."""
    return next((size for size in sizes if size >= number), None)


def graph_bytes(shape: ModelShape, part: Shard, step: Step) -> int:
    """Of one rank: what stays filled from step to step, the pool in which graphs keep what they compute, and the graphs."""
    sizes = decode_sizes(step.max_num_seqs)
    rows, hidden, b = sizes[-1], shape.decoder.hidden_size, step.itemsize
    blocks = -(-step.max_model_len // step.block_size)
    # parts of long contexts and attention's schedules are a few MiB, within the segments
    held = rows * (blocks * INT32 + 3 * INT64 + hidden * b)
    pool, count = rows * _row_bytes(shape, part, step), len(sizes)
    if shape.encoder is not None:
        encoder, tiles = shape.encoder, TILE_SIZES[-1]
        pixels, out = 3 * encoder.image_size**2, encoder.tokens_per_tile * hidden * b
        held += tiles * (pixels + out)
        pool = max(pool, tiles * tile_bytes(encoder, shape.decoder, b))
        count += len(TILE_SIZES)
    return held + pool + 2 * SEGMENT_BYTES + count * EACH_BYTES


def _row_bytes(shape: ModelShape, part: Shard, step: Step) -> int:
    """Of a token within a decoder layer, on Triton's kernels."""
    decoder, b = shape.decoder, step.itemsize
    query, kv = part.query_heads * decoder.head_dim, part.kv_heads * decoder.head_dim
    held = 6 * decoder.hidden_size * b + decoder.head_dim * FLOAT32  # the sums before and after, norms, result; cos and sin
    attention = (3 * query + 2 * kv) * b
    return held + max(attention, 3 * dense_width(decoder, part) * b, experts_peak(decoder, part, 1, b))
