"""The geometry of held-out scenes: outlines, where they lie, and what can be said of that without doubt."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from held_out.world import Thing

Points = npt.NDArray[np.complex128]  # x + iy with y downwards, so that to multiply is to turn
Box = tuple[float, float, float, float]  # left, top, right, bottom
Size = tuple[int, int]
WIDEST = (0.0, 0.78, 0.52, 0.45, 0.40, 0.36, 0.33, 0.31, 0.29, 0.27)  # of the shorter side, by the number of shapes
ATTEMPTS = 4000
LEAST, LEAST_LONG = 0.155, 0.21  # the same of compact shapes, and of those longer one way than the other
MOST_TURNED = 20
CLEARLY_LARGER = (1.45, 1.45, 1.25)  # in the three ways of Placed.extents
DOMINANT = 1.7  # how much farther along the asked axis than along the other


@dataclass(frozen=True)
class Placed:
    """A thing and its outline in pixels."""

    thing: Thing
    points: Points

    @property
    def box(self) -> Box:
        x, y = self.points.real, self.points.imag
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    @property
    def centre(self) -> complex:
        left, top, right, bottom = self.box
        return complex(left + right, top + bottom) / 2

    @property
    def extents(self) -> tuple[float, float, float]:
        """Width, the longer of width and height, and the square root of the area: three ways to see a size."""
        left, top, right, bottom = self.box
        area = abs(np.sum((self.points.conj() * np.roll(self.points, -1)).imag)) / 2
        return right - left, max(right - left, bottom - top), math.sqrt(area)

    def is_larger(self, other: "Placed") -> bool:
        """Whether it is, in every way to see it."""
        return all(
            mine >= least * theirs for mine, theirs, least in zip(self.extents, other.extents, CLEARLY_LARGER, strict=True)
        )

    def side_of(self, other: "Placed") -> str | None:
        """left, right, above or below, where that is beyond doubt."""
        (left, top, right, bottom), (their_left, their_top, their_right, their_bottom) = self.box, other.box
        away = self.centre - other.centre
        if abs(away.real) > DOMINANT * abs(away.imag) and (right < their_left or left > their_right):
            return "left" if away.real < 0 else "right"
        if abs(away.imag) > DOMINANT * abs(away.real) and (bottom < their_top or top > their_bottom):
            return "above" if away.imag < 0 else "below"
        return None

    def is_beyond(self, other: "Placed", side: str) -> bool:
        """Whether all of it lies on that side of all of the other, however far the other way."""
        (left, top, right, bottom), (their_left, their_top, their_right, their_bottom) = self.box, other.box
        return {
            "left": right < their_left,
            "right": left > their_right,
            "above": bottom < their_top,
            "below": top > their_bottom,
        }[side]


@dataclass(frozen=True)
class Scene:
    size: Size
    placed: tuple[Placed, ...]

    def position(self, placed: Placed) -> str | None:
        """The ninth of the picture that the thing's centre lies in, where it lies well inside."""
        names = []
        for where, side, (before, after) in (
            (placed.centre.imag, self.size[1], ("top", "bottom")),
            (placed.centre.real, self.size[0], ("left", "right")),
        ):
            third = 3 * where / side
            if third <= 0.75 or third >= 2.25:
                names.append(before if third < 1 else after)
            elif not 1.25 <= third <= 1.75:
                return None
        return " ".join(names) or "centre"


def spun(corners: list[complex], times: int) -> Points:
    return np.outer(np.exp(2j * np.pi * np.arange(times) / times), corners).ravel()


def outline(shape: str, rng: random.Random) -> Points:
    """Corners of a shape 1 long on its longer side, the middle of its bounding box at the origin, turned a little."""
    some, other = rng.random(), rng.random()
    arm = 2.4 + 1.4 * some
    lobe = 0.5 - 0.5j + math.sqrt(0.5) * np.exp(1j * np.radians(np.linspace(45, -135, 90)))
    flat = 1 / (1.95 + some)
    tall = 1.3 + 0.35 * some
    points = {
        "circle": spun([1], 180),
        "square": spun([1 + 1j], 4),
        "triangle": np.array([complex(0.5 * (other - 0.5), -(1.6 + 0.4 * some)), 1, -1]),
        "star": spun([-1j, -1j * (0.38 + 0.1 * some) * np.exp(0.2j * np.pi)], 5),
        "rectangle": np.array([-1 - flat * 1j, 1 - flat * 1j, 1 + flat * 1j, -1 + flat * 1j]) * (1j if other < 0.4 else 1),
        "diamond": np.array([-tall * 1j, 1, tall * 1j, -1]) * (1j if other < 0.25 else 1),
        "cross": spun([-1 - 1j, -1 - arm * 1j, 1 - arm * 1j], 4),
        "heart": np.append([lobe, -lobe.conj()[::-1]], 1j * (1 + 0.15 * some)),
    }[shape]
    x, y = points.real, points.imag
    points = (points - complex(x.max() + x.min(), y.max() + y.min()) / 2) / max(np.ptp(x), np.ptp(y))
    turned = points * np.exp(1j * math.radians(rng.triangular(-MOST_TURNED, MOST_TURNED)))
    x, y = turned.real, turned.imag
    return np.asarray(turned - complex(x.max() + x.min(), y.max() + y.min()) / 2)


def least_scale(shape: str) -> float:
    return LEAST_LONG if shape in ("rectangle", "diamond") else LEAST


def picture_size(rng: random.Random, ratio: float | None = None) -> Size:
    """From 120 to 1200 pixels a side; `ratio` is width by height, by default mostly near 1 and now and then 3 or 1/3."""
    if ratio is None:
        away = rng.choices([rng.uniform(1, 4 / 3), rng.uniform(4 / 3, 2), rng.uniform(2, 3)], [70, 24, 6])[0]
        ratio = away if rng.random() < 0.6 else 1 / away
    longer = max(ratio, 1 / ratio)
    short = math.exp(rng.uniform(math.log(120), math.log(1200 / longer)))
    width, height = (short * longer, short) if ratio >= 1 else (short, short * longer)
    return min(1200, round(width)), min(1200, round(height))


def scattered(rng: random.Random, reaches: Sequence[float], size: Size) -> list[complex] | None:
    """Centres of discs clear of one another and of the edges; the largest finds its place first."""
    found: dict[int, complex] = {}
    for i in sorted(range(len(reaches)), key=lambda i: -reaches[i]):
        if any(2 * reaches[i] >= side for side in size):
            return None
        for _ in range(40):
            centre = complex(*(rng.uniform(reaches[i], side - reaches[i]) for side in size))
            if all(abs(centre - other) > reaches[i] + reaches[j] for j, other in found.items()):
                found[i] = centre
                break
        else:
            return None
    return [found[i] for i in range(len(reaches))]


def in_grid(rng: random.Random, reaches: Sequence[float], size: Size) -> list[complex] | None:
    """Centres in rows and columns, each a little off the middle of its cell; None where the discs are too large for cells."""
    columns = min(len(reaches), max(1, round(math.sqrt(len(reaches) * size[0] / size[1]))))
    cell = (size[0] / columns, size[1] / math.ceil(len(reaches) / columns))
    if 2 * max(reaches) > min(cell):
        return None
    cells = list(itertools.product(range(math.ceil(len(reaches) / columns)), range(columns)))
    rng.shuffle(cells)

    def inside(place: int, side: float, reach: float) -> float:
        return (place + 0.5) * side + rng.uniform(-0.6, 0.6) * (side / 2 - reach)

    pairs = zip(cells, reaches, strict=False)
    return [complex(inside(column, cell[0], reach), inside(row, cell[1], reach)) for (row, column), reach in pairs]


def layout(rng: random.Random, things: Sequence[Thing], size: Size, scales: Sequence[float] | None = None) -> Scene:
    """Places things; `scales` are their longer sides as shares of the picture's shorter one, by default random."""
    short = min(size)
    arrange = in_grid if len(things) > 1 and rng.random() < 0.25 else scattered
    for attempt in range(300):
        least = [least_scale(thing.shape) for thing in things]
        shrink = 0.99**attempt
        drawn = [rng.uniform(low, max(low, WIDEST[len(things)] * shrink)) for low in least]
        if scales is not None:
            drawn = [max(low, scale * shrink) for low, scale in zip(least, scales, strict=True)]
        outlines = [outline(thing.shape, rng) * short * scale for thing, scale in zip(things, drawn, strict=True)]
        gap = 0.012 * short + 1.5
        centres = arrange(rng, [float(abs(points).max()) + gap for points in outlines], size)
        if centres is not None:
            together = zip(things, outlines, centres, strict=True)
            return Scene(size, tuple(Placed(thing, points + centre) for thing, points, centre in together))
        arrange = scattered
    raise RuntimeError(f"no room for {len(things)} shapes in {size}")


def layout_where(rng: random.Random, things: Callable[[], Sequence[Thing]], holds: Callable[[Scene], bool]) -> Scene:
    """Tries new things in new places until what a question supposes holds."""
    for _ in range(ATTEMPTS):
        scene = layout(rng, things(), picture_size(rng))
        if holds(scene):
            return scene
    raise RuntimeError(f"no scene fits the question in {ATTEMPTS} attempts")
