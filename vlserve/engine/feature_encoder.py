"""Pictures to features on all ranks: each encodes its share of a step's units, and all get the whole.

Shapes: F features, L levels, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlserve.engine.batch import EncodeTask
from vlserve.engine.cuda_graphs import UnitGraphs
from vlserve.engine.feature_cache import FeatureCache
from vlserve.engine.pixel_store import PixelStore
from vlserve.engine.process_group import DistributedGroup
from vlserve.kernels.upload import pinned
from vlserve.llm.decoder import Decoder
from vlserve.vision.pixels import Unit
from vlserve.vision.tower import Tower


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Which units each rank encodes: the dearest first, each to the rank with the least so far. Of equal ones, like cards.

    The busiest rank has at most 4/3 of what the best possible sharing gives it (Graham 1969, longest processing time first).
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        rank = min(range(num_ranks), key=loads.__getitem__)
        shares[rank].append(unit)
        loads[rank] += costs[unit]
    return [sorted(share) for share in shares]


class FeatureEncoder:
    """Units are dealt out by what they cost; one all-gather brings the features to every rank.

    Args:
        num_local: ranks that share rank 0's machine. graphs: for a few units, where there are any.
    """

    def __init__(
        self, tower: Tower, decoder: Decoder, pixels: PixelStore, *, num_local: int, graphs: UnitGraphs | None = None
    ) -> None:
        self._tower, self._decoder, self._pixels, self._num_local, self.graphs = tower, decoder, pixels, num_local, graphs
        self._group = decoder.split.group

    def encode(self, tasks: list[EncodeTask], features: FeatureCache) -> None:
        """Put the pictures' features [F, L, C] into the cache."""
        units = [unit for task in tasks for unit in task.units]
        shares = deal([self._tower.cost(unit) for unit in units], self._group.size)
        numbers = [[units[i].num_features for i in share] for share in shares]
        pixels, mine = self._share(tasks, shares), shares[self._group.rank]
        shape = max(map(sum, numbers)), self._tower.levels, self._decoder.config.hidden_size
        found = self._encode(pixels, [units[i] for i in mine], shape[1:])
        if len(found) < shape[0]:  # ranks gather as much of each
            found = torch.cat((found, found.new_zeros(shape[0] - len(found), *shape[1:])))
        gathered = self._group.all_gather(found, "features")  # [rank, F, L, C]
        del found
        of_unit: dict[int, torch.Tensor] = {}
        for share, given, of_rank in zip(shares, numbers, gathered, strict=True):
            of_unit.update(zip(share, of_rank[: sum(given)].split(given), strict=True))
        whole = iter(range(len(units)))
        for task in tasks:
            features.put(task.digest, torch.cat([of_unit[next(whole)] for _ in task.units]))

    def _encode(self, pixels: torch.Tensor, units: list[Unit], shape: tuple[int, ...]) -> torch.Tensor:
        """[F, L, C] of this rank's units, which may be none."""
        if not units:
            return self._decoder.norm.new_empty(0, *shape)
        found = (self._tower if self.graphs is None else self.graphs).encode(pixels, units)
        expected = (sum(unit.num_features for unit in units), *shape)
        if found.shape != expected:
            raise ValueError(f"{type(self._tower).__name__}.encode gave {tuple(found.shape)}; expected {expected}")
        return found

    def _share(self, tasks: list[EncodeTask], shares: list[list[int]]) -> torch.Tensor:
        """The units that this rank encodes, [bytes] uint8, ready to be sent to the device. On rank 0's machine everyone reads
        them where they lie; a rank elsewhere gets just its own from rank 0."""
        group = self._group
        sizes = [unit.num_bytes for task in tasks for unit in task.units]
        mine = shares[group.rank]
        share = pinned((sum(sizes[i] for i in mine),), torch.uint8, self._decoder.norm.device)
        if group.rank >= self._num_local:
            assert isinstance(group, DistributedGroup)
            return group.receive(share, "pixels") if mine else share
        flat: list[torch.Tensor] = []
        for task in tasks:
            of_task = [unit.num_bytes for unit in task.units]
            flat += self._pixels.open(task.digest, sum(of_task)).split(of_task)
        for rank in range(self._num_local, group.size if group.rank == 0 else 0):
            if shares[rank]:
                assert isinstance(group, DistributedGroup)
                group.send(torch.cat([flat[i] for i in shares[rank]]), rank, "pixels")
        return torch.cat([flat[i] for i in mine], out=share) if mine else share
