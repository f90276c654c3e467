"""Accuracy of a model by task and language on held-out pictures: through `VLPipeline`, or over HTTP with the openai package.

    python examples/demo_model/evaluate.py
    python examples/demo_model/evaluate.py --url http://127.0.0.1:8000/v1 --concurrency 16
    python examples/demo_model/evaluate.py --save before.jsonl, and later: --compare before.jsonl

Pictures, questions and marking come from held_out, which shares nothing with the training script. The last line is one JSON
document. With --compare, the exit status is 1 when any reply differs.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from held_out import TASKS, Item, is_right, make_items

MAX_TOKENS = 160  # a list of four shapes in JSON, in Chinese
SHOWN_DIFFERENCES = 5
COLUMNS = {"en": "English", "zh": "Chinese", "both": "both"}

Conversation = list[dict[str, Any]]
AskAll = Callable[[Sequence[Conversation]], list[str]]


def opening(item: Item, picture_part: Callable[[bytes, str], dict[str, Any]]) -> Conversation:
    """The first turn, with the pictures before the text."""
    if not item.images:
        return [{"role": "user", "content": item.turns[0]}]
    pictures = [picture_part(image, item.media_type) for image in item.images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": item.turns[0]}]}]


def converse(items: Sequence[Item], openings: Sequence[Conversation], ask_all: AskAll) -> list[list[str]]:
    """Each item's replies: all first turns, then all second ones, with the model's own first reply before them."""
    conversations = list(openings)
    replies: list[list[str]] = [[] for _ in items]
    for turn in range(max(len(item.turns) for item in items)):
        places = [i for i, item in enumerate(items) if turn < len(item.turns)]
        for i, reply in zip(places, ask_all([conversations[i] for i in places]), strict=True):
            replies[i].append(reply)
            conversations[i] = [*conversations[i], {"role": "assistant", "content": reply}]
            if turn + 1 < len(items[i].turns):
                conversations[i].append({"role": "user", "content": items[i].turns[turn + 1]})
    return replies


def ask_pipeline(items: Sequence[Item], model: str, options: dict[str, str]) -> list[list[str]]:
    from vlserve import VLPipeline

    with VLPipeline(model, **options) as pipe:

        def ask_all(conversations: Sequence[Conversation]) -> list[str]:
            return [answer.text for answer in pipe(list(conversations), max_tokens=MAX_TOKENS, temperature=0.0)]

        openings = [opening(item, lambda image, media_type: {"type": "image", "image": image}) for item in items]
        return converse(items, openings, ask_all)


def ask_http(items: Sequence[Item], model: str, url: str, concurrency: int) -> list[list[str]]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")

    def ask(conversation: Conversation) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=conversation,  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        return answer.choices[0].message.content or ""

    def part(image: bytes, media_type: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64," + base64.b64encode(image).decode()}}

    with ThreadPoolExecutor(concurrency) as pool:
        return converse(items, [opening(item, part) for item in items], lambda asked: list(pool.map(ask, asked)))


def tabulate(items: Sequence[Item], marks: Sequence[bool]) -> dict[str, dict[str, float]]:
    """Prints per cent right by task and language, and returns it; "all" is over all questions."""
    tasks = [task for task in TASKS if any(item.task == task for item in items)]
    table: dict[str, dict[str, float]] = {}
    print(f"{'':14}" + "".join(f"{title:>10}" for title in COLUMNS.values()) + f"{'of':>8}")
    for name in [*tasks, "all"]:
        row, asked = {}, 0
        for column in COLUMNS:
            chosen = [
                mark
                for item, mark in zip(items, marks, strict=True)
                if name in (item.task, "all") and column in (item.language, "both")
            ]
            asked = len(chosen)
            if chosen:
                row[column] = round(100 * sum(chosen) / asked, 1)
        print(f"{name:14}" + "".join(f"{row[c]:8.1f} %" if c in row else f"{'-':>10}" for c in COLUMNS) + f"{asked:8}")
        table[name] = row
    return table


def save(path: Path, items: Sequence[Item], replies: Sequence[list[str]], marks: Sequence[bool]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for item, said, mark in zip(items, replies, marks, strict=True):
            line = {"task": item.task, "language": item.language, "turns": item.turns, "replies": said}
            print(json.dumps(line | {"answer": item.answer, "right": mark}, ensure_ascii=False), file=lines)


def read_saved(path: Path, items: Sequence[Item]) -> list[list[str]]:
    """The replies of a saved run; it must have asked the same."""
    saved = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [line["turns"] for line in saved] != [list(item.turns) for item in items]:
        sys.exit(f"{path} has replies to other questions ({len(saved)} of them): give the same --number, --seed and --tasks")
    return [line["replies"] for line in saved]


def compare(items: Sequence[Item], replies: Sequence[list[str]], saved: Sequence[list[str]]) -> int:
    """Prints the first replies that differ from a saved run, and returns how many do."""
    different = [triple for triple in zip(items, replies, saved, strict=True) if triple[1] != triple[2]]
    for item, now, before in different[:SHOWN_DIFFERENCES]:
        print(f"{item.task}, {item.language}: {' / '.join(item.turns)!r} -> {now!r}, saved was {before!r}")
    print(f"{len(different)} of {len(items)} conversations differ from the saved run")
    return len(different)


def read_tasks(text: str) -> tuple[str, ...]:
    tasks = tuple(text.split(","))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown task {unknown[0]!r}; tasks: {', '.join(TASKS)}")
    return tasks


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model, or its id at --url")
    parser.add_argument("--url", help="an OpenAI-compatible server's base URL; default: VLPipeline in this process")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of VLPipeline, e.g. kv_cache_dtype=int8; again for more",
    )
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time, with --url")
    parser.add_argument("--number", type=int, default=2000, help="questions in all, evenly over tasks and languages")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--tasks", type=read_tasks, default=TASKS, metavar="A,B", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write every reply, one JSON document a line")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="count the replies that differ from a saved run")
    args = parser.parse_args()
    if args.number < 1:
        parser.error(f"--number is {args.number}; it must be at least 1")
    if wrong := [option for option in args.option if "=" not in option]:
        parser.error(f"--option is {wrong[0]!r}; it must be NAME=VALUE")
    if args.option and args.url:
        parser.error("--option is for a model in this process; give it to the server instead")
    return args


def main() -> None:
    args = read_arguments()
    items = make_items(args.number, args.seed, args.tasks)
    saved = read_saved(args.compare, items) if args.compare else None
    if args.url:
        replies = ask_http(items, args.model, args.url, args.concurrency)
    else:
        replies = ask_pipeline(items, args.model, dict(option.split("=", 1) for option in args.option))
    marks = [is_right(item, said[-1]) for item, said in zip(items, replies, strict=True)]
    wrong = [(item, said) for item, said, mark in zip(items, replies, marks, strict=True) if not mark]
    for item, said in wrong[: args.show_wrong]:
        asked = " / ".join(item.turns)
        print(f"{item.task}, {item.language}: {asked!r} -> {' / '.join(said)!r}, right is {item.answer!r}")
    if args.save:
        save(args.save, items, replies, marks)
    result: dict[str, Any] = {"number": len(items), "seed": args.seed, "accuracy": tabulate(items, marks)}
    if saved is not None:
        result["different"] = compare(items, replies, saved)
    print(json.dumps(result))
    sys.exit(1 if result.get("different") else 0)


if __name__ == "__main__":
    main()
