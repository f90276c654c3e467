"""Work of a few fixed sizes, recorded as CUDA graphs at its first time and replayed afterwards: decode steps and pictures.

A step is padded to the next size and put into buffers that stay where they are; replaying launches all kernels of the decoder
at once. All but `CudaRecorder` is the same on any device. Shapes: S rows of a size, M blocks of the longest sequence, C hidden
size, A axes of a position, L levels of features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from vlserve.engine.batch import Rows, known_ids
from vlserve.engine.process_group import DistributedGroup, Traffic
from vlserve.kernels.attention.plan import FixedDecodes, Shape, read_shape
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.upload import pinned, upload
from vlserve.llm.decoder import Decoder
from vlserve.llm.kv_cache import KeysAndValues, KVCache
from vlserve.llm.tensor_parallel import Group
from vlserve.models.base import Model
from vlserve.plan.cuda_graph_sizes import TILE_SIZES, decode_sizes, next_size
from vlserve.vision.pixels import Unit
from vlserve.vision.tower import Tower

log = logging.getLogger(__name__)
ALIGNED, INT32, INT64 = 16, 4, 8  # bytes
Work = Callable[[], None]


class Recorder(Protocol):
    """Makes graphs within a number of bytes; `num_free_bytes` are those left."""

    num_free_bytes: int

    def record(self, work: Work) -> Work:
        """A graph of `work`, which is not done by this; the result replays it. Raises RuntimeError."""


class CudaRecorder:
    """All graphs of a rank share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device, self.num_free_bytes = device, num_bytes
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # as recording begins with it, which would look like memory won
        before = torch.cuda.mem_get_info(self._device)[0]
        # thread_local: other threads, as NCCL's own, may go on asking the driver
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self.num_free_bytes -= max(0, before - torch.cuda.mem_get_info(self._device)[0])
        return graph.replay


class Graphs:
    """Work by size: done as it is and then recorded the first time, replayed from then on.

    `group`: ranks whose work holds collectives; they record the same sizes in the same order, or none of them does.
    """

    def __init__(self, name: str, sizes: tuple[int, ...], recorder: Recorder, group: Group | None = None) -> None:
        self._name, self._sizes, self._recorder = name, sizes, recorder
        self._group = group if isinstance(group, DistributedGroup) else None
        self._replays: dict[int, tuple[Work, dict[str, Traffic]]] = {}

    @property
    def recorded(self) -> tuple[int, ...]:
        """Sizes, in the order of their first steps."""
        return tuple(self._replays)

    def size_for(self, number: int) -> int | None:
        """The size to which `number` is padded; None where it is computed as it is."""
        return next_size(self._sizes, number)

    def run(self, size: int, work: Work) -> None:
        """Do `work`, which is always the same for a size and reads and writes tensors that stay where they are."""
        if size not in self._replays:
            work()  # its kernels are compiled by this, and libraries get ready
            self._record(size, work)
            return
        replay, traffic = self._replays[size]
        replay()
        if self._group is not None:
            self._group.count(traffic)

    def _record(self, size: int, work: Work) -> None:
        if not self._all(self._recorder.num_free_bytes > 0):
            log.warning("the memory set aside for CUDA graphs is used up: no more are made for %s", self._name)
            self._sizes = tuple(sorted(self._replays))
            return
        cause, traffic = "another rank could not", dict[str, Traffic]()
        try:
            if self._group is None:
                replay = self._recorder.record(work)
            else:
                with self._group.recording() as traffic:
                    replay = self._recorder.record(work)
            is_made = True
        except Exception as error:  # noqa: BLE001  (a package's model may raise what it likes; the step itself has been done)
            is_made, cause = False, f"{type(error).__name__}: {error}"
        if self._all(is_made):
            self._replays[size] = replay, traffic
            return
        self._sizes, self._replays = (), {}
        log.warning("no CUDA graphs for %s, which is launched kernel by kernel: %s (--enforce-eager says so at once)",
                    self._name, cause)  # fmt: skip

    def _all(self, answer: bool) -> bool:
        """Whether it is so on every rank."""
        return answer if self._group is None else self._group.minimum(int(answer), "graphs") == 1


class DecodeGraphs:
    """Decode steps through buffers of a fixed size. Rows of padding are sequences of one token in `spare_block`, which nobody
    owns and to which all of them write the same."""

    def __init__(
        self, model: Model, cache: KVCache, recorder: Recorder, *, max_num_seqs: int, max_model_len: int, spare_block: int
    ) -> None:
        self._decoder, self._cache = model.decoder, cache
        self._spare_block, self._block_size = spare_block, cache.block_size
        self._device = model.decoder.norm.device
        sizes = decode_sizes(max_num_seqs)
        self.graphs = Graphs("decode steps", sizes, recorder, model.decoder.split.group)
        width = -(-max_model_len // self._block_size)
        self._tables = torch.full((sizes[-1], width), spare_block, dtype=torch.int32, device=self._device)
        self._hidden = model.decoder.norm.new_zeros(sizes[-1], model.decoder.config.hidden_size)
        self._buffers: dict[int, _Buffers] = {}

    def size_for(self, rows: Rows) -> int | None:
        """The size of the buffers that take this step; None for one that has prefills or is too large."""
        return self.graphs.size_for(len(rows.ids)) if rows.are_decodes else None

    def run(self, size: int, rows: Rows, last_tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, C] of a step, to be used before the next one."""
        buffers = self._buffers.get(size)
        if buffers is None:
            fixed = self._fixed(size)
            buffers = self._buffers[size] = _Buffers(
                size, fixed, self._tables[:size], self._block_size, self._decoder.num_position_axes
            )
        self._fill(buffers, rows, last_tokens)

        def work() -> None:
            x = self._decoder.embed(buffers.ids)
            self._hidden[:size].copy_(self._decoder(x, buffers.positions, self._cache, buffers.metadata))

        self.graphs.run(size, work)
        return self._hidden[: len(rows.ids)]

    def _fixed(self, size: int) -> list[FixedDecodes]:
        return [FixedDecodes(size, shape) for shape in attention_shapes(self._decoder, self._cache)]

    def _fill(self, buffers: _Buffers, rows: Rows, last_tokens: torch.Tensor) -> None:
        spare = len(buffers.ids) - len(rows.ids)
        slot, lens = self._spare_block * self._block_size, (*rows.context_lens, *[1] * spare)
        number = len(rows.ids)
        axes = [rows.positions[first : first + number] for first in range(0, len(rows.positions), number)]
        positions = [position for axis in axes for position in [*axis, *[0] * spare]]
        buffers.put([*rows.ids, *[0] * spare], positions, [*rows.slots, *[slot] * spare], lens)
        width = max(map(len, rows.tables))
        tables = [block for table in rows.tables for block in table + table[-1:] * (width - len(table))]
        tables += [self._spare_block] * (spare * width)
        buffers.tables[:, :width].copy_(upload(tables, torch.int32, self._device).view(-1, width))
        buffers.ids.copy_(known_ids(buffers.ids, last_tokens))


def attention_shapes(decoder: Decoder, cache: KVCache) -> list[Shape]:
    """One for each kind of cache that is attended to; layers of one kind share theirs."""
    attended = [layers[0] for kind, layers in cache.serves.items() if isinstance(kind, KeysAndValues)]
    keys = [cache.layers[layer][0] for layer in attended]
    return [read_shape(decoder.num_query_heads, decoder.norm.dtype, decoder.norm.device, one) for one in keys]


class _Buffers:
    """Of one size: slots and ids [S] and positions [A, S] int64 and attention's schedules int32, in one piece of memory."""

    def __init__(self, size: int, fixed: Sequence[FixedDecodes], tables: torch.Tensor, block_size: int, num_axes: int) -> None:
        device = tables.device
        self.fixed, self.tables = fixed, tables
        # kernels read slots and schedules, which begin where memory is aligned: Triton compiles anew for another alignment
        self._padding = -(2 + num_axes) * size % (ALIGNED // INT64)
        self._num_integers = (2 + num_axes) * size + self._padding
        self._num_numbers = [-(-one.num_numbers // (ALIGNED // INT32)) * (ALIGNED // INT32) for one in fixed]
        self._num_words = self._num_integers + sum(self._num_numbers) * INT32 // INT64
        self._words = torch.zeros(self._num_words, dtype=torch.int64, device=device)
        slots, self.ids, positions, _ = self._words[: self._num_integers].split([size, size, num_axes * size, self._padding])
        self.positions = positions.view(num_axes, size)
        numbers = self._words[self._num_integers :].view(torch.int32).split(self._num_numbers)
        launches = {}
        for one, schedule in zip(fixed, numbers, strict=True):
            launches.update(one.launches(schedule[: one.num_numbers], tables))
        self.metadata = AttentionMetadata(
            query_lens=(),  # the schedule has them
            context_lens=(),
            block_tables=tables,
            slots=slots,
            block_size=block_size,
            decodes=(),
            prefills=(),
            launches=dict(launches),
        )

    def put(self, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], context_lens: Sequence[int]) -> None:
        """In one copy."""
        words = pinned((self._num_words,), torch.int64, self._words.device)
        words[: self._num_integers] = torch.tensor([*slots, *ids, *positions, *[0] * self._padding])
        numbers = [
            number
            for one, size in zip(self.fixed, self._num_numbers, strict=True)
            for number in [*one.numbers(context_lens), *[0] * (size - one.num_numbers)]
        ]
        words[self._num_integers :].view(torch.int32)[:] = torch.tensor(numbers, dtype=torch.int32)
        self._words.copy_(words, non_blocking=True)


class UnitGraphs:
    """A few equal units through the vision encoder; there are no collectives in it, so each rank has its own sizes."""

    def __init__(self, tower: Tower, unit: Unit, decoder: Decoder, recorder: Recorder) -> None:
        self._tower, self._unit = tower, unit
        self.graphs = Graphs("the vision encoder", TILE_SIZES, recorder)
        most, norm = TILE_SIZES[-1], decoder.norm
        self._pixels = torch.zeros(most * unit.num_bytes, dtype=torch.uint8, device=norm.device)
        self._features = norm.new_zeros(most * unit.num_features, tower.levels, decoder.config.hidden_size)

    def encode(self, pixels: torch.Tensor, units: Sequence[Unit]) -> torch.Tensor:
        """As `Tower.encode`; to be used before the next call."""
        size = self.graphs.size_for(len(units))
        if size is None:
            return self._tower.encode(pixels, units)
        self._pixels[: len(pixels)].copy_(pixels, non_blocking=True)
        features = self._features[: size * self._unit.num_features]

        def work() -> None:
            features.copy_(self._tower.encode(self._pixels[: size * self._unit.num_bytes], [self._unit] * size))

        self.graphs.run(size, work)
        return features[: len(units) * self._unit.num_features]
