"""Times the preparation of pictures, from JPEG bytes to tiles, against transformers' image processor on the same pictures.

Checks first that both give the same pixels. Ours hands on uint8 tiles with a digest, since the floats are made on the
device that encodes them; the column "with floats" makes them here too, as transformers does. Runs alternate, and the
figures are medians of ratios, since machines are noisy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlserve.config import MediaConfig
from vlserve.media.loader import PictureLoader
from vlserve.models.tiles import TilePreprocessor
from vlserve.prompt.chat_messages import ImagePart
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.pixels import Pixels
from vlserve.vision.preprocess import normalise

SIZES = ((1920, 1080), (1280, 960), (640, 480), (4032, 3024), (1080, 1920), (800, 800))
CONFIG = ImageConfig(tile_size=448, tokens_per_tile=256, max_patches=12)
PREPROCESSOR = TilePreprocessor(image=CONFIG, tokens=("<img>", "<IMG_CONTEXT>", "</img>"), image_token_id=0)


def pictures(number: int) -> list[bytes]:
    """JPEGs of common sizes with about the detail of photographs."""
    rng, made = np.random.default_rng(0), []
    for index in range(number):
        width, height = SIZES[index % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.integers(-8, 9, (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def processor() -> Callable[[bytes], torch.Tensor]:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    size = {"height": CONFIG.tile_size, "width": CONFIG.tile_size}
    process: Any = GotOcr2ImageProcessor(
        size=size,
        crop_to_patches=True,
        min_patches=CONFIG.min_patches,
        max_patches=CONFIG.max_patches,
        image_mean=list(CONFIG.mean),
        image_std=list(CONFIG.std),
    )

    def one(data: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return process(image, return_tensors="pt")["pixel_values"]

    return one


def ours(data: list[bytes], workers: int) -> Callable[[], list[Pixels]]:
    """One request a picture, all at once, as a busy server has them."""
    loader = PictureLoader(MediaConfig(media_workers=workers))

    async def load() -> list[Pixels]:
        parts = [ImagePart(source=one, param="image", local=True) for one in data]
        return [pixels for [pixels] in await asyncio.gather(*(loader.load([part], PREPROCESSOR) for part in parts))]

    return lambda: asyncio.run(load())


def floats(pixels: Pixels) -> torch.Tensor:
    return normalise(
        torch.from_numpy(pixels.data).view(-1, *CONFIG.unit.shape), torch.tensor(CONFIG.mean), torch.tensor(CONFIG.std)
    )


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()

    data, theirs = pictures(args.pictures), processor()
    for one, pixels in zip(data, ours(data, 1)(), strict=True):
        assert torch.equal(floats(pixels), theirs(one)), "pixels differ: no figures"
    rows = []
    for workers in args.workers:
        load, pool = ours(data, workers), ThreadPoolExecutor(workers)
        forms: dict[str, Callable[[], Any]] = {
            "vlserve": load,
            "with floats": lambda load=load, pool=pool: list(pool.map(floats, load())),
            "transformers": lambda pool=pool: list(pool.map(theirs, data)),
        }
        times: dict[str, list[float]] = {name: [] for name in forms}
        for run in range(args.runs + 1):
            for name, work in forms.items():
                took = seconds(work)
                if run:  # the first warms up
                    times[name].append(took)
        pool.shutdown()
        row: dict[str, Any] = {"workers": workers}
        row |= {name: round(args.pictures / statistics.median(took), 1) for name, took in times.items()}
        for name, key in (("vlserve", "times_as_fast"), ("with floats", "times_as_fast_with_floats")):
            ratios = [b / a for a, b in zip(times[name], times["transformers"], strict=True)]
            row[key] = round(statistics.median(ratios), 2)
        rows.append(row)

    print("pictures a second")
    print(f"{'workers':>8}{'vlserve':>10}{'with floats':>13}{'transformers':>14}   times as fast (with floats)")
    for row in rows:
        print(
            f"{row['workers']:8}{row['vlserve']:10.1f}{row['with floats']:13.1f}{row['transformers']:14.1f}"
            f"   {row['times_as_fast']:.2f} ({row['times_as_fast_with_floats']:.2f})"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads"
    print(json.dumps({"machine": machine, "pictures": args.pictures, "rows": rows}))


if __name__ == "__main__":
    main()
