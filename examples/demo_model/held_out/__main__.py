"""Writes held-out pictures and an items.jsonl with their questions into a folder, to look at.

python examples/demo_model/held_out OUT_DIR --number 64
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from held_out import make_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="folder to write to; made where it is missing")
    parser.add_argument("--number", type=int, default=64, help="how many items, evenly over tasks and languages (default: 64)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same items (default: 1)")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with (args.out_dir / "items.jsonl").open("w", encoding="utf-8") as lines:
        for i, item in enumerate(make_items(args.number, args.seed)):
            names = [f"{i:04d}{'abc'[place]}.jpeg" for place in range(len(item.images))]
            for name, image in zip(names, item.images, strict=True):
                (args.out_dir / name).write_bytes(image)
            print(json.dumps(asdict(item) | {"images": names}, ensure_ascii=False), file=lines)


if __name__ == "__main__":
    main()
