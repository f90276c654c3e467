"""How a picture is cut into tiles: pure arithmetic on (height, width), without pixels.

The rule is InternVL's dynamic tiling as transformers' processor applies it
(`get_optimal_tiled_canvas`): of all grids of `min_patches` to `max_patches` tiles, the one whose
aspect ratio is nearest to the picture's; on a tie the larger grid, as long as the picture has more
than half of the grid's pixels. A picture of more than one tile gets a thumbnail of the whole as
its last tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Grid:
    """Columns and rows of full tiles; the thumbnail is not counted."""

    columns: int
    rows: int

    @property
    def cells(self) -> int:
        return self.columns * self.rows

    @property
    def num_tiles(self) -> int:
        """Tiles that the encoder sees where there is a thumbnail."""
        return self.cells if self.cells == 1 else self.cells + 1


@lru_cache(maxsize=64)
def candidate_grids(min_patches: int, max_patches: int) -> tuple[Grid, ...]:
    """All grids of `min_patches` to `max_patches` tiles, few tiles first, then narrow ones first."""
    sides = range(1, max_patches + 1)
    grids = [Grid(c, r) for c in sides for r in range(1, max_patches // c + 1) if min_patches <= c * r]
    return tuple(sorted(grids, key=lambda grid: grid.columns * grid.rows))


def choose_grid(height: int, width: int, *, tile_size: int, min_patches: int, max_patches: int) -> Grid:
    """The grid for a picture of `height` x `width` pixels."""
    best, best_difference = Grid(1, 1), float("inf")
    for grid in candidate_grids(min_patches, max_patches):
        difference = abs(width / height - grid.columns / grid.rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * grid.columns * grid.rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = grid, difference
    return best
