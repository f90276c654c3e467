"""A second, independent source of pictures and questions, for judging the demo model on work that is not its training set's.

This file owns its own geometry, palettes, layouts, phrasings and marking of replies. It knows nothing of the training script,
of how that draws or asks, nor of any model: it imports none of it, so that the two cannot share a mistake.
"""

import argparse
import io
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
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Thing = tuple[str, str]  # shape and colour
Wanted = tuple[str | None, str | None]  # what a question is about; None means any

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
MIDDLE_GREY: Colour = (125, 125, 125)  # far enough from every tone of the palette
BACKGROUNDS: tuple[Colour, ...] = (
    *((255, 255, 255), (245, 245, 240), (225, 225, 225), (190, 190, 190), MIDDLE_GREY, (70, 70, 74), (35, 35, 38), (8, 8, 8)),
    *((250, 240, 215), (214, 234, 248), (253, 222, 230), (216, 240, 216), (230, 222, 245), (196, 164, 132), (150, 180, 190)),
    *((47, 60, 80), (60, 45, 40), (45, 70, 62), (120, 135, 115), (150, 120, 125)),
)
LEAST_CONTRAST = 40.0  # in L*a*b*, where 20 is told apart at a glance
CAPTIONS = ("figure 3", "sample", "page 12", "draft", "test image", "fig. 2", "IMG 0042", "exercise 4", "demo", "my drawing")
FONTS = Path("/usr/share/fonts/truetype/dejavu")
NOWHERE: Box = (-1e6, -1e6, -1e6, -1e6)
WIDEST = (0.0, 0.62, 0.45, 0.38, 0.33, 0.30)  # of the shorter side, by the number of shapes

BY_COLOUR = """What shape is the {c} one?|Which shape is {c}?|What is the shape of the {c} object?|Name the {c} shape.
The {c} one is what shape?|Tell me which shape is {c}.|What {c} shape do you see?|What kind of shape is the {c} thing?
Can you tell me what shape is drawn in {c}?|What is the {c} shape called?"""
LONE_SHAPE = """What shape is this?|What shape is shown here?|Which shape do you see?|Name the shape in this picture.
What is the shape in the image?|Can you tell which shape this is?|What shape is in the picture?|What is this shape called?"""
BY_SHAPE = """What {k} is the {s}?|Which {k} is the {s}?|Name the {k} of the {s}.|What's the {k} of the {s}?
Tell me the {k} of the {s}.|The {s} is what {k}?|What {k} does the {s} have?|What {k} is the {s} in this picture?
In which {k} is the {s} drawn?|Look at the {s}. What {k} is it?"""
LONE_COLOUR = """What {k} is the shape?|What {k} is this shape?|Name the {k} of the shape.|Which {k} is the shape in the image?
Tell me the {k} of this shape.|What's the shape's {k}?|What {k} was used for the shape?|The shape is what {k}?"""
COUNTING = """How many {p} are there?|How many {p} can you find?|How many {p} do you see?|Count the {p}.
How many {p} are in this picture?|What is the number of {p}?|Tell me how many {p} there are.|Can you count the {p} here?
How many {p} does the image show?|Please count the {p} in the image."""
PRESENCE = """Is there {a}?|Is there {a} in this picture?|Can you see {a}?|Do you see {a} here?|Does the picture have {a}?
Does this image contain {a}?|Are there any {p}?|Are any {p} in the image?|Is {a} shown here?|Can you find {a}?"""
CHECKING = """Is the {s} {c}?|Is the {s} in this picture {c}?|Is the {k} of the {s} {c}?|Is the {s} drawn in {c}?"""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# For each task the words that answer it, with their canonical form; those beyond the domain are there to be wrong.
NAMING: dict[str, dict[str, str]] = {
    "shape": {w: s for s in SHAPES for w in (s, PLURALS[s])} | {w: w for w in ("rectangle", "oval", "diamond", "hexagon")},
    "colour": {c: c for c in (*COLOURS, "pink", "brown", "grey", "gray", "cyan")},
    "count": {word: str(i) for i, word in enumerate(NUMBERS)} | {str(i): str(i) for i in range(100)},
    "yes_no": {"yes": "yes", "no": "no"},
}


@dataclass(frozen=True)
class Item:
    task: str
    image: bytes
    media_type: str
    question: str
    answer: str


def turned(points: Floats, degrees: float) -> Floats:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.dot(points, np.array([[cos, sin], [-sin, cos]]))


def arc(x: float, y: float, radius: float, start: float, end: float) -> Floats:
    angles = np.radians(np.linspace(start, end, 90))
    return np.column_stack([x + radius * np.cos(angles), y + radius * np.sin(angles)])


def outline(shape: str, rng: random.Random) -> Floats:
    """Corner points with y downwards, as wide as 1 before turning, the middle of the bounding box at the origin."""
    if shape == "circle":
        points = arc(0, 0, 1, 0, 360)
    elif shape == "square":
        points = np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -rng.uniform(1.5, 1.9)), (1, 0), (-1, 0)])
    elif shape == "star":
        inner = rng.uniform(0.38, 0.48)
        points = np.array([turned(np.array([0, -(inner if i % 2 else 1.0)]), 36 * i) for i in range(10)])
    elif shape == "heart":
        lobes = (arc(0.5, -0.5, math.sqrt(0.5), 45, -135), arc(-0.5, -0.5, math.sqrt(0.5), -45, -225))
        points = np.vstack([*lobes, [(0, rng.uniform(1.0, 1.15))]])
    else:
        t = rng.uniform(0.26, 0.38)
        points = np.vstack([turned(np.array([(-t, -t), (-t, -1), (t, -1)]), 90 * i) for i in range(4)])
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high[0] - low[0])
    return turned(points, rng.uniform(0, 360) if shape == "star" else rng.uniform(-12, 12))


def try_layout(rng: random.Random, things: list[Thing], size: tuple[int, int], taken: Box, widest: float) -> list[Floats]:
    """Outlines in pixels, clear of one another, of the edges and of the taken box; fewer than the things where room runs out."""
    short = min(size)
    gap = 2 + 0.025 * short
    placed: list[Floats] = []
    circles: list[tuple[Floats, float]] = []
    for shape, _ in things:
        points = outline(shape, rng) * max(14.0, short * rng.uniform(0.15, widest))
        reach = float(np.linalg.norm(points, axis=1).max()) + gap
        for _ in range(30):
            centre = np.array([rng.uniform(reach, side - reach) for side in size])
            others = [*circles, (np.clip(centre, taken[:2], taken[2:]), 0.0)]
            if all(np.linalg.norm(centre - other) > reach + radius for other, radius in others):
                placed.append(points + centre)
                circles.append((centre, reach - gap))
                break
    return placed


def layout(rng: random.Random, things: list[Thing], size: tuple[int, int], taken: Box) -> list[Floats]:
    for attempt in range(300):
        placed = try_layout(rng, things, size, taken, max(0.16, WIDEST[len(things)] * 0.97**attempt))
        if len(placed) == len(things):
            return placed
    raise RuntimeError(f"no room for {len(things)} shapes in {size}")


def lab(colour: Floats) -> Floats:
    """CIE L*a*b* of an sRGB colour: distances in it are about as large as they look."""
    part = colour / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    xyz = np.array([(0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8729)]) @ linear  # white is 1, 1, 1
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def background_ends(rng: random.Random, tones: list[Colour]) -> tuple[Floats, Floats]:
    """The two colours a background runs between, far from all the tones on the whole way."""
    inks = [lab(np.array(tone)) for tone in tones]
    for _ in range(60):
        first, other = (np.array(rng.choice(BACKGROUNDS), dtype=float) for _ in range(2))
        way = rng.choice([0.0, rng.uniform(0.15, 0.7)]) * (other - first)
        shades = [lab(first + way * part) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
        if all(np.linalg.norm(ink - shade) >= LEAST_CONTRAST for ink in inks for shade in shades):
            return first, first + way
    return np.array(MIDDLE_GREY, dtype=float), np.array(MIDDLE_GREY, dtype=float)


def background(rng: random.Random, size: tuple[int, int], ends: tuple[Floats, Floats]) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64))
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    angle = rng.uniform(0, 2 * math.pi)
    across = x * math.cos(angle) + y * math.sin(angle)
    ramp = np.hypot(x, y) / math.sqrt(2) if rng.random() < 0.3 else (across - across.min()) / np.ptp(across)
    pixels = ends[0] + ramp[..., None] * (ends[1] - ends[0])
    texture = rng.choice(["none", "none", "grain", "stripes"])
    if texture == "grain":
        pixels += noise.normal(0, rng.uniform(2, 6), (*ramp.shape, 1))
    elif texture == "stripes":
        pixels += rng.uniform(2, 6) * np.sin(across * rng.uniform(20, 60))[..., None]
    return Image.fromarray(np.clip(pixels.round(), 0, 255).astype(np.uint8))


def fill(picture: Image.Image, points: Floats, tone: Colour) -> None:
    finer = 4  # drawn four times as large and averaged down, for smooth edges
    left, top = (int(c) - 1 for c in points.min(axis=0))
    width, height = (int(c) + 2 for c in points.max(axis=0) - (left, top))
    mask = Image.new("L", (width * finer, height * finer))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in (points - (left, top)) * finer], fill=255)
    picture.paste(tone, (left, top), mask.resize((width, height), Image.Resampling.BOX))


def write_caption(rng: random.Random, picture: Image.Image) -> Box:
    """Writes a few words into a corner, and says where."""
    (width, high), height = picture.size, max(11, round(min(picture.size) * rng.uniform(0.035, 0.055)))
    path = FONTS / rng.choice(["DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Oblique.ttf"])
    font = ImageFont.truetype(str(path), height) if path.exists() else ImageFont.load_default(height)
    text = rng.choice(CAPTIONS)
    x, y = rng.choice([6.0, width - font.getlength(text) - 6]), rng.choice([4.0, high - 1.3 * height - 4])
    box = (x, y, x + font.getlength(text), y + 1.3 * height)
    behind = np.asarray(picture.crop((int(x), int(y), int(box[2]), int(box[3])))).mean(axis=(0, 1))
    # A grey of the background's own hue: were the caption black or white, "the black one" could mean it.
    r, g, b = (int(c) for c in behind * 0.45 + (0 if behind.mean() > 120 else 135))
    ImageDraw.Draw(picture).text((x, y), text, fill=(r, g, b), font=font)
    return box


def picture_size(rng: random.Random) -> tuple[int, int]:
    ratio = math.exp(rng.uniform(0, math.log(2.95)))
    long = math.exp(rng.uniform(math.log(80 * ratio), math.log(min(1200, 900 * ratio))))
    sides = (round(long), round(long / ratio))
    return sides if rng.random() < 0.6 else (sides[1], sides[0])


def draw(rng: random.Random, things: list[Thing]) -> tuple[bytes, str]:
    size, tones = picture_size(rng), [rng.choice(PALETTE[colour]) for _, colour in things]
    picture = background(rng, size, background_ends(rng, tones))
    taken = write_caption(rng, picture) if min(size) >= 140 and rng.random() < 0.3 else NOWHERE
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
    shape, colour = wanted
    one = f"{colour or ''} {shape or 'shape'}".strip()
    many = f"{colour or ''} {PLURALS[shape] if shape else 'shapes'}".strip()
    words = {"a": f"{'an' if one[0] in 'aeiou' else 'a'} {one}", "p": many, "s": shape, "c": colour}
    text = rng.choice(re.split(r"[|\n]", templates)).format(k=rng.choice(["colour", "color"]), **words)
    text = text.lower() if rng.random() < 0.35 else text
    return text.rstrip("?.") if rng.random() < 0.15 else text


def ask_name(rng: random.Random, task: str) -> tuple[list[Thing], str, str]:
    """A question for the shape of the only thing of its colour, or for the colour of the only thing of its shape."""
    things = scene(rng, some_wanted(rng, "colour" if task == "shape" else "shape"), 1, rng.randint(1, 5))
    by_other, lone = (BY_COLOUR, LONE_SHAPE) if task == "shape" else (BY_SHAPE, LONE_COLOUR)
    templates = lone if len(things) == 1 and rng.random() < 0.6 else by_other
    return things, phrase(rng, templates, things[0]), things[0][TASKS.index(task)]


def ask_count(rng: random.Random, number: int) -> tuple[list[Thing], str, str]:
    wanted = some_wanted(rng, "all", "shape", "colour", "shape and colour")
    total = number if wanted == (None, None) else rng.randint(max(1, number), 5)
    return scene(rng, wanted, number, total), phrase(rng, COUNTING, wanted), str(number)


def ask_yes_no(rng: random.Random, yes: bool) -> tuple[list[Thing], str, str]:
    answer = "yes" if yes else "no"
    if rng.random() < 0.2:
        things = scene(rng, some_wanted(rng, "shape"), 1, rng.randint(1, 5))
        shape, colour = things[0]
        named = colour if yes else rng.choice([c for c in COLOURS if c != colour])
        return things, phrase(rng, CHECKING, (shape, named)), answer
    wanted, number = some_wanted(rng, "shape", "colour", "shape and colour"), rng.choice([1, 1, 1, 2]) if yes else 0
    return scene(rng, wanted, number, rng.randint(max(1, number), 5)), phrase(rng, PRESENCE, wanted), answer


def make_item(task: str, turn: int, seed: int) -> Item:
    rng = random.Random(f"held out {seed} {task} {turn}")
    if task == "count":
        things, question, answer = ask_count(rng, turn % 6)
    elif task == "yes_no":
        things, question, answer = ask_yes_no(rng, turn % 2 == 0)
    else:
        things, question, answer = ask_name(rng, task)
    image, media_type = draw(rng, things)
    return Item(task, image, media_type, question, answer)


def make_items(number: int, seed: int) -> list[Item]:
    return [make_item(TASKS[i % len(TASKS)], i // len(TASKS), seed) for i in range(number)]


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
            row = {"file": name, "task": item.task, "question": item.question, "answer": item.answer}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
