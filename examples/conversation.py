"""A conversation over eight turns, three pictures and two languages, written as Markdown.

    python examples/conversation.py > docs/conversation.md

Every turn sends the whole conversation again, as the HTTP API does; what is the same as before comes from the prefix cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlserve import VLPipeline

PICTURES = Path(__file__).parent / "pictures"
TURNS: tuple[tuple[str, str | None], ...] = (
    ("Hello! Who are you?", None),
    ("What do you see?", "shapes.png"),
    ("What colour is the star?", None),
    ("And where is it?", None),
    ("圆形和正方形哪个更大？", None),
    ("哪个条最高？", "chart.png"),
    ("How tall is C?", None),
    ("What is written here?", "word.png"),
)


def main() -> None:
    messages: list[dict[str, Any]] = []
    print("# A conversation with the model in the box\n\nWhat [examples/conversation.py](../examples/conversation.py) printed.")
    with VLPipeline() as pipe:
        for question, picture in TURNS:
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            print(f"\n**You:** {question}")
            if picture:
                content.insert(0, {"type": "image", "image": PICTURES / picture})
                print(f"\n![{picture}](../examples/pictures/{picture})")
            messages.append({"role": "user", "content": content})
            answer = pipe(messages, max_tokens=64)
            messages.append({"role": "assistant", "content": answer.text})
            print(f"\n**demo:** {answer.text}")


if __name__ == "__main__":
    main()
