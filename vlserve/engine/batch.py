"""Turns a step's chunks into tensors. Shapes: T tokens of all chunks, B chunks, M blocks at most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlserve.engine.scheduler import Chunk
from vlserve.engine.sequence import ImageSpan
from vlserve.kernels.paged_attention import AttentionMetadata, plan_attention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImagePiece:
    """Rows row..row+(stop-start) of the step take features start..stop of a picture."""

    image: ImageSpan
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    metadata: AttentionMetadata
    pieces: tuple[ImagePiece, ...]
    sample_rows: torch.Tensor  # [R] int64, the last rows of the chunks that sample
    partial_blocks: list[int]  # fresh blocks that this step fills only in part


def make_batch(chunks: list[Chunk], block_size: int, device: torch.device) -> Batch:
    """One step's tensors on `device`; chunks follow one another in the given order."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    pieces: list[ImagePiece] = []
    partial_blocks: list[int] = []
    for chunk in chunks:
        sequence, row = chunk.sequence, len(ids)
        ids += sequence.token_ids[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        slots += [sequence.blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop)]
        for image in sequence.images:
            if image.overlaps(chunk.start, chunk.stop):
                start, stop = max(chunk.start, image.start), min(chunk.stop, image.stop)
                piece = ImagePiece(image=image, row=row + start - chunk.start, start=start - image.start, stop=stop - image.start)
                pieces.append(piece)
        last_start = chunk.stop // block_size * block_size
        if chunk.start <= last_start < chunk.stop:
            partial_blocks.append(sequence.blocks[-1])
        if chunk.samples:
            sample_rows.append(len(ids) - 1)
    width = max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = [s.blocks + s.blocks[-1:] * (width - len(s.blocks)) for s in (chunk.sequence for chunk in chunks)]
    return Batch(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        metadata=plan_attention(
            query_lens=tuple(chunk.stop - chunk.start for chunk in chunks),
            context_lens=tuple(chunk.stop for chunk in chunks),
            block_tables=torch.tensor(tables, device=device),
            slots=torch.tensor(slots, device=device),
            block_size=block_size,
        ),
        pieces=tuple(pieces),
        sample_rows=torch.tensor(sample_rows, device=device, dtype=torch.int64),
        partial_blocks=partial_blocks,
    )
