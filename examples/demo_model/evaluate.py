"""Accuracy of a model by task on held-out pictures: through `VLPipeline`, or over HTTP with the openai package.

    python examples/demo_model/evaluate.py --number 1000
    python examples/demo_model/evaluate.py --number 1000 --url http://127.0.0.1:8000/v1 --concurrency 16

Pictures and questions come from held_out.py, which shares nothing with the training script. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from held_out import Item, is_right, make_items

MAX_TOKENS = 24


def ask_pipeline(items: list[Item], model: str) -> list[str]:
    from vlserve import VLPipeline

    with VLPipeline(model) as pipe:
        prompts = [(item.question, item.image) for item in items]
        return [answer.text for answer in pipe(prompts, max_tokens=MAX_TOKENS)]


def ask_http(items: list[Item], model: str, url: str, concurrency: int) -> list[str]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")

    def ask(item: Item) -> str:
        picture = f"data:{item.media_type};base64," + base64.b64encode(item.image).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": item.question}]
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model, or its id at --url")
    parser.add_argument("--url", help="an OpenAI-compatible server's base URL; default: VLPipeline in this process")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time, with --url")
    parser.add_argument("--number", type=int, default=1000, help="questions in all")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print the first N wrong answers")
    args = parser.parse_args()

    items = make_items(args.number, args.seed)
    replies = ask_http(items, args.model, args.url, args.concurrency) if args.url else ask_pipeline(items, args.model)
    right: dict[str, list[bool]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        right[item.task].append(is_right(item, reply))
        if not right[item.task][-1] and args.show_wrong > 0:
            args.show_wrong -= 1
            print(f"{item.task}: {item.question!r} -> {reply!r}, right is {item.answer!r}")
    table = {task: round(100 * sum(hits) / len(hits), 1) for task, hits in sorted(right.items())}
    for task, accuracy in table.items():
        print(f"{task:10} {accuracy:5.1f} %  of {len(right[task])}")
    print(json.dumps({"number": len(items), "seed": args.seed, "accuracy": table}))


if __name__ == "__main__":
    main()
