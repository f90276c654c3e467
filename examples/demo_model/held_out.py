"""A second, independent source of pictures and questions, for judging the demo model on work that is not its training set's.

This file owns its geometry, palettes, layouts, phrasings and marking of replies. It knows nothing of how the training script
draws or asks, nor of any model: it imports none of that, so that the two cannot share a mistake.
"""

import argparse
import io
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float64]
Points = npt.NDArray[np.complex128]  # x + iy with y downwards, so that to multiply is to turn
Colour = tuple[int, int, int]
Thing = tuple[str, str]  # shape and colour
Wanted = tuple[str | None, str | None]  # what a question is about; None means any
Asked = tuple[list[Thing], str, str]  # what to draw, the question, the answer

TASKS = ("shape", "colour", "count", "yes_no")
PLURALS = {s: s + "s" for s in ("circle", "square", "triangle", "star", "heart")} | {"cross": "crosses"}
SHAPES = tuple(PLURALS)
PALETTE: dict[str, tuple[Colour, ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (205, 0, 0), (227, 26, 28), (214, 39, 40)),
    "orange": ((255, 140, 0), (255, 127, 14), (245, 130, 32), (255, 150, 20)),
    "yellow": ((255, 255, 0), (255, 225, 25), (255, 235, 59), (255, 240, 80), (250, 220, 40)),
    "green": ((0, 128, 0), (34, 139, 34), (50, 205, 50), (44, 160, 44), (60, 179, 75)),
    "blue": ((0, 0, 255), (65, 105, 225), (30, 80, 220), (30, 144, 255), (0, 71, 171)),
    "purple": ((128, 0, 128), (148, 0, 211), (106, 13, 173), (145, 30, 180), (102, 51, 153)),
    "black": ((0, 0, 0), (12, 12, 12), (22, 22, 22), (16, 16, 22)),
    "white": ((255, 255, 255), (250, 250, 250), (248, 248, 255), (245, 245, 245)),
}
COLOURS = tuple(PALETTE)
BACKGROUNDS: tuple[Colour, ...] = (
    *((255, 255, 255), (245, 245, 240), (225, 225, 225), (190, 190, 190), (125, 125, 125), (70, 70, 74), (35, 35, 38), (8, 8, 8)),
    *((250, 240, 215), (214, 234, 248), (253, 222, 230), (216, 240, 216), (230, 222, 245), (196, 164, 132), (150, 180, 190)),
    *((47, 60, 80), (60, 45, 40), (45, 70, 62), (120, 135, 115), (150, 120, 125)),
)
TO_YCC = np.array([(0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)])  # lightness weighs as it does in JPEG
LEAST_CONTRAST = 70.0  # by TO_YCC; black and white are 255 apart
CAPTIONS = ("figure 3", "sample", "page 12", "draft", "test image", "fig. 2", "IMG 0042", "exercise 4", "demo", "my drawing")
WIDEST = (0.0, 0.62, 0.45, 0.38, 0.33, 0.30)  # of the shorter side, by the number of shapes

BY_COLOUR = """What shape is the {c} one?|Which shape is {c}?|What is the shape of the {c} object?|Name the {c} shape.
The {c} one is what shape?|Tell me which shape is {c}.|What is the {c} shape called?|What kind of shape is the {c} thing?"""
LONE_SHAPE = """What shape is this?|What shape is shown here?|Which shape do you see?|Name the shape in this picture.
What is the shape in the image?|Can you tell which shape this is?|What shape is in the picture?|What is this shape called?"""
BY_SHAPE = """What {k} is the {s}?|Which {k} is the {s}?|Name the {k} of the {s}.|What's the {k} of the {s}?
Tell me the {k} of the {s}.|The {s} is what {k}?|What {k} does the {s} have?|Look at the {s}. What {k} is it?"""
COUNTING = """How many {p} are there?|How many {p} can you find?|How many {p} do you see?|Count the {p}.
How many {p} are in this picture?|What is the number of {p}?|Tell me how many {p} there are.|Can you count the {p} here?"""
PRESENCE = """Is there {a}?|Is there {a} in this picture?|Can you see {a}?|Do you see {a} here?|Does the picture have {a}?
Does this image contain {a}?|Are there any {p}?|Are any {p} in the image?|Is {a} shown here?|Can you find {a}?"""
CHECKING = """Is the {s} {c}?|Is the {s} in this picture {c}?|Is the {k} of the {s} {c}?|Is the {s} drawn in {c}?"""
# For each task the words that answer it, with their canonical form; those beyond the domain are there to be wrong.
NAMING: dict[str, dict[str, str]] = {
    "shape": {w: s for s in SHAPES for w in (s, PLURALS[s])} | {w: w for w in ("rectangle", "oval", "diamond", "hexagon")},
    "colour": {c: c for c in (*COLOURS, "pink", "brown", "grey", "gray", "cyan")},
    "count": {str(i): str(i) for i in range(1000)}
    | {w: str(i) for i, w in enumerate(("zero", "one", "two", "three", "four", "five", "six"))},
    "yes_no": {"yes": "yes", "no": "no"},
}


@dataclass(frozen=True)
class Item:
    task: str
    image: bytes
    media_type: str
    question: str
    answer: str


def spun(corners: list[complex], times: int) -> Points:
    return np.outer(np.exp(2j * np.pi * np.arange(times) / times), corners).ravel()


def outline(shape: str, rng: random.Random) -> Points:
    """Corners of a shape as wide as 1 before it is turned, the middle of its bounding box at the origin."""
    some, turn = rng.random(), rng.uniform(0, 360) if shape == "star" else rng.uniform(-12, 12)
    lobe = 0.5 - 0.5j + math.sqrt(0.5) * np.exp(1j * np.radians(np.linspace(45, -135, 90)))
    points = {
        "circle": spun([1], 180),
        "square": spun([1 + 1j], 4),
        "triangle": np.array([-1j * (1.5 + 0.4 * some), 1, -1]),
        "star": spun([-1j, -1j * (0.38 + 0.1 * some) * np.exp(0.2j * np.pi)], 5),
        "heart": np.append([lobe, -lobe.conj()[::-1]], 1j * (1 + 0.15 * some)),
        "cross": spun([-1 - 1j, -1 - (2.6 + 1.2 * some) * 1j, 1 - (2.6 + 1.2 * some) * 1j], 4),
    }[shape]
    x, y = points.real, points.imag
    points = (points - complex(x.max() + x.min(), y.max() + y.min()) / 2) / np.ptp(x)
    return np.asarray(points * np.exp(1j * math.radians(turn)))


def layout(rng: random.Random, things: list[Thing], size: tuple[int, int], taken: tuple[float, ...]) -> list[Points]:
    """Outlines in pixels, clear of one another, of the edges and of the taken box."""
    short, (left, top, right, bottom) = min(size), taken
    for attempt in range(5000):
        widest = max(0.16, WIDEST[len(things)] * 0.99**attempt)
        outlines = [outline(shape, rng) * max(14.0, short * rng.uniform(0.15, widest)) for shape, _ in things]
        reaches = [float(abs(points).max()) + 1.5 + 0.015 * short for points in outlines]
        centres = [complex(*(rng.uniform(reach, side - reach) for side in size)) for reach in reaches]
        circles = list(zip(centres, reaches, strict=True))
        nearest = [complex(min(max(c.real, left), right), min(max(c.imag, top), bottom)) for c in centres]
        apart = all(abs(c - d) > r + q for (c, r), (d, q) in itertools.combinations(circles, 2))
        if apart and all(abs(c - corner) > r for (c, r), corner in zip(circles, nearest, strict=True)):
            return [points + centre for points, centre in zip(outlines, centres, strict=True)]
    raise RuntimeError(f"no room for {len(things)} shapes in {size}")


def background_ends(rng: random.Random, tones: list[Colour]) -> tuple[Floats, Floats]:
    """The two colours a background runs between, far from all the tones on the whole way."""
    for _ in range(60):
        first, other = (np.array(rng.choice(BACKGROUNDS), dtype=float) for _ in range(2))
        way = rng.choice([0.0, rng.uniform(0.15, 0.7)]) * (other - first)
        steps = [first + way * part - tone for part in (0.0, 0.25, 0.5, 0.75, 1.0) for tone in tones]
        if all(np.linalg.norm(TO_YCC @ step) >= LEAST_CONTRAST for step in steps):
            return first, first + way
    return np.full(3, 125.0), np.full(3, 125.0)  # a middle grey is never near a tone of the palette


def background(rng: random.Random, size: tuple[int, int], ends: tuple[Floats, Floats]) -> Image.Image:
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    across = np.real((x + 1j * y) * np.exp(1j * rng.uniform(0, 2 * math.pi)))
    ramp = np.hypot(x, y) / math.sqrt(2) if rng.random() < 0.3 else (across - across.min()) / np.ptp(across)
    pixels = ends[0] + ramp[..., None] * (ends[1] - ends[0])
    grain, stripe = rng.choice([(0.0, 0.0), (0.0, 0.0), (rng.uniform(2, 6), 0.0), (0.0, rng.uniform(2, 6))])
    noise = np.random.default_rng(rng.getrandbits(64)).normal(size=(*ramp.shape, 1))
    pixels += grain * noise + stripe * np.sin(across * rng.uniform(20, 60))[..., None]
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def fill(picture: Image.Image, points: Points, tone: Colour) -> None:
    finer = 4  # drawn four times as large and averaged down, for smooth edges
    left, top = int(points.real.min()) - 1, int(points.imag.min()) - 1
    width, height = int(points.real.max()) + 2 - left, int(points.imag.max()) + 2 - top
    mask = Image.new("L", (width * finer, height * finer))
    corners = [(corner.real, corner.imag) for corner in (finer * (points - complex(left, top))).tolist()]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    picture.paste(tone, (left, top), mask.resize((width, height), Image.Resampling.BOX))


def write_caption(rng: random.Random, picture: Image.Image) -> tuple[float, ...]:
    """Writes a few words into a corner, and says where."""
    text, height = rng.choice(CAPTIONS), max(11, round(min(picture.size) * rng.uniform(0.035, 0.055)))
    path = Path(f"/usr/share/fonts/truetype/dejavu/DejaVu{rng.choice(['Sans', 'Serif', 'SansMono', 'Sans-Oblique'])}.ttf")
    font = ImageFont.truetype(str(path), height) if path.exists() else ImageFont.load_default(height)
    wide, high = int(font.getlength(text)) + 1, int(1.3 * height)
    x, y = rng.choice([6, picture.width - wide - 6]), rng.choice([4, picture.height - high - 4])
    behind = np.asarray(picture.crop((x, y, x + wide, y + high))).mean(axis=(0, 1))
    # A grey of the background's own hue: were the caption black or white, "the black one" could mean it.
    r, g, b = (int(c) for c in behind * 0.45 + (0 if behind.mean() > 120 else 135))
    ImageDraw.Draw(picture).text((x, y), text, fill=(r, g, b), font=font)
    return x, y, x + wide, y + high


def draw(rng: random.Random, things: list[Thing]) -> tuple[bytes, str]:
    ratio, tones = math.exp(rng.uniform(0, math.log(2.95))), [rng.choice(PALETTE[colour]) for _, colour in things]
    long = math.exp(rng.uniform(math.log(80 * ratio), math.log(min(1200, 900 * ratio))))
    size = (round(long), round(long / ratio)) if rng.random() < 0.6 else (round(long / ratio), round(long))
    picture = background(rng, size, background_ends(rng, tones))
    taken = write_caption(rng, picture) if min(size) >= 140 and rng.random() < 0.3 else (-1e6, -1e6, -1e6, -1e6)
    for points, tone in zip(layout(rng, things, size, taken), tones, strict=True):
        fill(picture, points, tone)
    out, kind = io.BytesIO(), rng.choice(["png", "jpeg"])
    picture.save(out, kind, quality=rng.randint(40, 95))
    return out.getvalue(), f"image/{kind}"


def scene(rng: random.Random, wanted: Wanted, matching: int, total: int) -> list[Thing]:
    """So many things that match, first, and others that do not but often come close."""
    things: list[Thing] = []
    while len(things) < total:
        match = len(things) < matching
        shape, colour = wanted if match else rng.choice([(wanted[0], None), (None, wanted[1]), (None, None)])
        thing = (shape or rng.choice(SHAPES), colour or rng.choice(COLOURS))
        if match == all(want in (None, has) for want, has in zip(wanted, thing, strict=True)):
            things.append(thing)
    return things


def some_wanted(rng: random.Random, *kinds: str) -> Wanted:
    kind = rng.choice(kinds)
    return (rng.choice(SHAPES) if "shape" in kind else None, rng.choice(COLOURS) if "colour" in kind else None)


def phrase(rng: random.Random, templates: str, wanted: Wanted) -> str:
    shape, colour = wanted[0] or "shape", wanted[1] or ""
    one, many = f"{colour} {shape}".strip(), f"{colour} {PLURALS.get(shape, 'shapes')}".strip()
    words = {"a": f"{'an' if one[0] in 'aeiou' else 'a'} {one}", "p": many, "s": shape, "c": colour}
    text = rng.choice(re.split(r"[|\n]", templates)).format(k=rng.choice(["colour", "color"]), **words)
    text = text.rstrip("?.") if rng.random() < 0.15 else text
    return text.lower() if rng.random() < 0.35 else text


def ask_name(rng: random.Random, asked: int) -> Asked:
    """Asks for the shape (0) of the only thing of its colour, or for the colour (1) of the only thing of its shape."""
    things = scene(rng, some_wanted(rng, TASKS[1 - asked]), 1, rng.randint(1, 5))
    lone = len(things) == 1 and rng.random() < 0.6
    templates = (LONE_SHAPE if lone else BY_COLOUR, BY_SHAPE)[asked]
    return things, phrase(rng, templates, (None, None) if lone else things[0]), things[0][asked]


def ask_count(rng: random.Random, number: int) -> Asked:
    wanted = some_wanted(rng, "all", "shape", "colour", "shape and colour")
    total = number if wanted == (None, None) else rng.randint(max(1, number), 5)
    return scene(rng, wanted, number, total), phrase(rng, COUNTING, wanted), str(number)


def ask_yes_no(rng: random.Random, no: int) -> Asked:
    answer = ("yes", "no")[no]
    if rng.random() < 0.2:
        things = scene(rng, some_wanted(rng, "shape"), 1, rng.randint(1, 5))
        named = rng.choice([c for c in COLOURS if (c != things[0][1]) == bool(no)])
        return things, phrase(rng, CHECKING, (things[0][0], named)), answer
    wanted, number = some_wanted(rng, "shape", "colour", "shape and colour"), 0 if no else rng.choice([1, 1, 1, 2])
    return scene(rng, wanted, number, rng.randint(max(1, number), 5)), phrase(rng, PRESENCE, wanted), answer


def make_item(number: int, seed: int) -> Item:
    (turn, which), rng = divmod(number, len(TASKS)), random.Random(f"held out {seed} {number}")
    ask, about = ((ask_name, 0), (ask_name, 1), (ask_count, turn % 6), (ask_yes_no, turn % 2))[which]
    things, question, answer = ask(rng, about)
    return Item(TASKS[which], *draw(rng, things), question, answer)


def make_items(number: int, seed: int) -> list[Item]:
    return [make_item(i, seed) for i in range(number)]


def is_right(item: Item, reply: str) -> bool:
    """Whether the reply names the answer, and nothing else that could have been one."""
    known = NAMING[item.task]
    return {known[word] for word in re.findall(r"[a-z]+|\d+", reply.lower()) if word in known} == {item.answer}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write held-out pictures and an items.jsonl with their questions, to look at.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to write to; made where it is missing")
    parser.add_argument("--number", type=int, default=40, help="how many items, evenly over the four tasks (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same items (default: 1)")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with (args.out_dir / "items.jsonl").open("w", encoding="utf-8") as lines:
        for i, item in enumerate(make_items(args.number, args.seed)):
            name = f"{i:04d}.{item.media_type.removeprefix('image/')}"
            (args.out_dir / name).write_bytes(item.image)
            print(json.dumps({"file": name, "task": item.task, "question": item.question, "answer": item.answer}), file=lines)


if __name__ == "__main__":
    main()
