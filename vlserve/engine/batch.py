"""What a step computes, as every rank must know it, and the tensors made from it.

Rank 0 describes a step from its sequences (`describe`) and tells the others what they do not know yet (`Announcer`, `Listener`);
each then lays out the same numbers (`lay_out`) and makes the same tensors (`make_batch`, or cuda_graphs.py). Shapes: T tokens of
all chunks, A axes of a position, B chunks, M blocks at most, R rows that sample, F that take features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import msgspec
import torch

from vlserve.engine.scheduler import Chunk
from vlserve.engine.sequence import Sequence
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.upload import upload
from vlserve.vision.pixels import Unit


class FeaturePiece(msgspec.Struct, frozen=True, array_like=True):
    """A picture's features from `first` on go to rows of the step: `runs` of (first row, number)."""

    digest: bytes
    first: int
    runs: list[tuple[int, int]]

    @property
    def stop(self) -> int:
        return self.first + sum(number for _, number in self.runs)


class EncodeTask(msgspec.Struct, frozen=True, array_like=True):
    """A picture to encode in this step."""

    digest: bytes
    units: list[Unit]


class ChunkPlace(msgspec.Struct, frozen=True, array_like=True):
    """Tokens start..stop of sequence `id`, whose keys and values are in `blocks`.

    `positions`: where they stand, one axis after another; [] where each stands at its place in the sequence and `offset`.
    """

    id: int
    start: int
    stop: int
    samples: bool
    blocks: list[int]
    positions: list[int] = []
    offset: int = 0


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    ids: list[int]  # [T]; -1-r is the token sampled last in row r, which every rank has on its device
    chunks: list[ChunkPlace]
    pieces: list[FeaturePiece]
    encode: list[EncodeTask]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One step's numbers, on the host; a row is a token of it."""

    ids: list[int]
    positions: list[int]  # [A * T], one axis after another
    feature_rows: list[int]  # rows that take features, in the pieces' order
    slots: list[int]
    sample_rows: list[int]  # [R], the last rows of the chunks that sample
    partial_blocks: list[int]  # fresh blocks that this step fills only in part
    tables: list[list[int]]  # the blocks of each chunk
    query_lens: tuple[int, ...]  # [B]
    context_lens: tuple[int, ...]  # [B]

    @property
    def are_decodes(self) -> bool:
        """Every chunk is one token."""
        return len(self.ids) == len(self.query_lens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [A, T] int64
    metadata: AttentionMetadata
    sample_rows: torch.Tensor  # [R] int64
    feature_rows: torch.Tensor  # [F] int64


def describe(chunks: list[Chunk], is_missing: Iterable[bytes], last_rows: Mapping[int, int]) -> StepInput:
    """A step's chunks, one after another.

    Args:
        is_missing: digests of pictures whose features are not there yet.
        last_rows: the row of each sequence among the tokens that were sampled last.
    """
    missing = set(is_missing)
    ids: list[int] = []
    pieces: list[FeaturePiece] = []
    encode: dict[bytes, EncodeTask] = {}
    for chunk in chunks:
        row = len(ids)
        ids += chunk.sequence.token_ids[chunk.start : chunk.stop]
        if chunk.samples and chunk.sequence.id in last_rows:
            ids[-1] = -1 - last_rows[chunk.sequence.id]
        for media in chunk.media:
            first, parts = media.within(chunk.start, chunk.stop)
            pieces.append(FeaturePiece(media.digest, first, [(row + start - chunk.start, number) for start, number in parts]))
            if media.digest in missing:
                encode[media.digest] = EncodeTask(media.digest, list(media.units))
    return StepInput(ids, [_place(chunk) for chunk in chunks], pieces, list(encode.values()))


def _place(chunk: Chunk) -> ChunkPlace:
    sequence, own = chunk.sequence, chunk.sequence.positions
    positions, offset = ([], 0) if own is None else (own.between(chunk.start, chunk.stop), own.offset)
    return ChunkPlace(sequence.id, chunk.start, chunk.stop, chunk.samples, sequence.blocks, positions, offset)


def lay_out(step: StepInput, block_size: int, num_axes: int = 1) -> Rows:
    """`num_axes`: numbers that a token's position has."""
    axes: list[list[int]] = [[] for _ in range(num_axes)]
    num_rows = 0
    slots: list[int] = []
    sample_rows: list[int] = []
    partial_blocks: list[int] = []
    for chunk in step.chunks:
        places = range(chunk.start, chunk.stop)
        num_rows += len(places)
        for number, axis in enumerate(axes):
            own = chunk.positions[number * len(places) : (number + 1) * len(places)]
            axis += own or range(chunk.start + chunk.offset, chunk.stop + chunk.offset)
        slots += [chunk.blocks[p // block_size] * block_size + p % block_size for p in places]
        last_start = chunk.stop // block_size * block_size
        if chunk.start <= last_start < chunk.stop:
            partial_blocks.append(chunk.blocks[-1])
        if chunk.samples:
            sample_rows.append(num_rows - 1)
    return Rows(
        ids=step.ids,
        positions=list(chain.from_iterable(axes)),
        feature_rows=[row for piece in step.pieces for first, number in piece.runs for row in range(first, first + number)],
        slots=slots,
        sample_rows=sample_rows,
        partial_blocks=partial_blocks,
        tables=[chunk.blocks for chunk in step.chunks],
        query_lens=tuple(chunk.stop - chunk.start for chunk in step.chunks),
        context_lens=tuple(chunk.stop for chunk in step.chunks),
    )


def make_batch(rows: Rows, block_size: int, device: torch.device, last_tokens: torch.Tensor) -> Batch:
    """One step's tensors on `device`, in one copy; `last_tokens` [R] int64 are what was sampled last, for ids below 0."""
    width = max(map(len, rows.tables))
    tables = [block for table in rows.tables for block in table + table[-1:] * (width - len(table))]
    # slots come first, where memory is aligned: a kernel reads them, and Triton compiles it anew for another alignment
    parts = rows.slots, rows.ids, rows.positions, rows.sample_rows, rows.feature_rows, tables
    numbers = upload([number for part in parts for number in part], torch.int64, device)
    slots, ids, positions, sample_rows, feature_rows, block_tables = numbers.split([len(part) for part in parts])
    return Batch(
        ids=known_ids(ids, last_tokens),
        positions=positions.view(-1, len(rows.ids)),
        metadata=plan_attention(
            query_lens=rows.query_lens,
            context_lens=rows.context_lens,
            block_tables=block_tables.unflatten(0, (-1, width)),
            slots=slots,
            block_size=block_size,
        ),
        sample_rows=sample_rows,
        feature_rows=feature_rows,
    )


def known_ids(ids: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """ids [T] with those below 0 taken from the tokens sampled last."""
    return torch.where(ids < 0, last_tokens[(-1 - ids).clamp_min(0)], ids)


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """One message a step. Of a block table it has only what the others do not know: places `known[i]` and on."""

    step: StepInput | None  # None: nothing to compute, rank 0 lives
    known: list[int]
    ended: list[int]  # sequences whose tables can be forgotten
    dropped: list[bytes]  # pictures whose features are not kept any more
    is_last: bool = False


class Announcer:
    """Rank 0's side; remembers what the others know."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[list[int], int]] = {}  # by sequence: the list, and how much of it was told
        self._ended: list[int] = []
        self._dropped: list[bytes] = []
        self._encoder = msgspec.msgpack.Encoder()

    def step(self, step: StepInput, chunks: list[Chunk]) -> bytes:
        known = []
        places = []
        for place, chunk in zip(step.chunks, chunks, strict=True):
            known.append(self._num_known(chunk.sequence))
            places.append(msgspec.structs.replace(place, blocks=place.blocks[known[-1] :]))
        return self._message(StepInput(step.ids, places, step.pieces, step.encode), known)

    def idle(self, *, is_last: bool = False) -> bytes:
        return self._message(None, [], is_last)

    def ended(self, ids: Iterable[int]) -> None:
        for id in ids:
            if self._tables.pop(id, None) is not None:
                self._ended.append(id)

    def dropped(self, digests: Iterable[bytes]) -> None:
        self._dropped += digests

    def _num_known(self, sequence: Sequence) -> int:
        table, known = self._tables.get(sequence.id, (None, 0))
        self._tables[sequence.id] = (sequence.blocks, len(sequence.blocks))
        return known if table is sequence.blocks else 0  # another list: it was preempted

    def _message(self, step: StepInput | None, known: list[int], is_last: bool = False) -> bytes:
        message = self._encoder.encode(Announcement(step, known, self._ended, self._dropped, is_last))
        self._ended, self._dropped = [], []
        return message


class Listener:
    """The other ranks' side: completes block tables."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}
        self._decoder = msgspec.msgpack.Decoder(Announcement)

    def read(self, message: bytes) -> Announcement:
        """The announcement with whole block tables."""
        told = self._decoder.decode(message)
        for id in told.ended:
            del self._tables[id]
        if told.step is None:
            return told
        places = []
        for place, known in zip(told.step.chunks, told.known, strict=True):
            table = self._tables[place.id] = self._tables.get(place.id, [])[:known] + place.blocks
            places.append(msgspec.structs.replace(place, blocks=table))
        step = StepInput(told.step.ids, places, told.step.pieces, told.step.encode)
        return msgspec.structs.replace(told, step=step)
