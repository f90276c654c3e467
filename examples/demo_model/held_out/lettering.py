"""Written numbers and words: fonts, a list of words, and pictures of them."""

import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from held_out.drawing import PALETTE, Tone, any_tone, encode, lightness
from held_out.shapes import picture_size

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10"),
)
LEAST_CONTRAST = 75.0
LEAST_LETTER = 13  # pixels of width for each character
NARROWEST, WIDEST = 0.53, 0.9  # of the picture's width
MOST_TURNED = 5.0
COMMON = """
apple animal answer arm autumn baby bag baker ball banana band bank barn basket bath beach bean bear bed bee bell bench
berry bike bird blanket boat body book boot border bottle bowl box boy branch bread breeze brick bridge brother brush
bucket bus butter button cake camera camp candle candy captain car carrot castle cat cave chair chalk cheese cherry chess
chicken child church city clock cloth cloud coat coffee coin cook cookie copper corn cotton country cousin cow cream
cricket crown cup curtain dance day deer desert desk dinner doctor dog doll dolphin donkey door dragon dream dress drum
duck eagle ear earth egg elbow engine evening eye face family farm farmer father feather fence field finger fire fish flag
floor flower flute fly forest fork fox friend frog fruit game garden garlic gate giant gift giraffe girl glass glove goat
gold grape grass guitar hair hall hammer hand harbor hat hen hill holiday honey horse hotel hour house ice island jacket
jar jelly juice jungle kettle key kitchen kite kitten knee knife ladder lake lamb lamp leaf leather lemon lesson letter
library lion lizard lunch machine magnet map market meadow medicine melon metal milk mirror monkey month moon morning
mother mountain mouse mouth museum music nail neck needle nest net night north nose nurse nut ocean office olive onion
orchard oven owl paint palace pan panda paper parent park parrot pasta path peach pear pen pencil pepper piano pig
pillow pilot pizza planet plant plate pocket pond pony potato prince puppy queen rabbit radio rain rice ring river road
robot rocket roof room root rope rose rug sail salad salt sand sandwich school sea season seed sheep shell ship shirt
shoe shop silver singer sister sky sleep snake snow soap sock sofa soldier soup south spider spoon spring stone store storm
story street student sugar summer sun swan sweater table tail tea teacher temple tent tiger toast tomato tongue tool tooth
towel tower town toy train tree truck tunnel turtle uncle valley village violin voice wagon wall water weather whale
wheat wheel wind window winter wolf wood worker yard year zebra
"""
WORDS = tuple(COMMON.split())


@cache
def font_folder() -> Path:
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ImportError(
            'held-out pictures use the fonts of matplotlib, which is in the extra "bench": pip install "vlserve[bench]"'
        )
    return Path(found.origin).parent / "mpl-data/fonts/ttf"


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_folder() / f"{name}.ttf"), size)


def styled(rng: random.Random, word: str) -> str:
    return rng.choice([word.upper(), word.lower(), word.capitalize()])


def turned_text(text: str, name: str, width: float, degrees: float) -> Image.Image:
    """A mask of the text, so wide before it is turned, with nothing around it."""
    left, _, right, _ = font(name, 100).getbbox(text)
    chosen = font(name, max(8, round(100 * width / (right - left))))
    left, top, right, bottom = (int(edge) for edge in chosen.getbbox(text))
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=chosen)
    mask = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return mask.crop(mask.getbbox())


def write(rng: random.Random, text: str) -> bytes:
    """The text on a plain background, at least half as wide as the picture."""
    name = rng.choice(FONTS)
    left, top, right, bottom = font(name, 100).getbbox(text)
    aspect = (right - left) / (bottom - top)
    while True:
        share = rng.uniform(NARROWEST, WIDEST)
        size = picture_size(rng)
        if size[0] / size[1] > 0.8 * aspect / share:  # too flat for letters so high
            share = NARROWEST
            size = picture_size(rng, max(0.4, 0.8 * aspect / share))
        mask = turned_text(text, name, share * size[0], rng.choice([0.0, rng.uniform(-MOST_TURNED, MOST_TURNED)]))
        room = (size[0] - mask.width - 4, size[1] - mask.height - 4)
        if min(room) >= 0 and mask.width >= max(LEAST_LETTER * len(text), size[0] / 2):
            break
    ink: Tone = rng.choice(PALETTE[rng.choice(list(PALETTE))]) if rng.random() < 0.7 else any_tone(rng)
    ground = any_tone(rng)
    while lightness(ink, ground) < LEAST_CONTRAST:
        ground = any_tone(rng)
    picture = Image.new("RGB", size, ground)
    picture.paste(ink, (2 + rng.randint(0, room[0]), 2 + rng.randint(0, room[1])), mask)
    return encode(rng, picture)
