"""A conversation with the model in the box: eight turns, three pictures, two languages. Prints it as Markdown.

python examples/conversation.py
"""

from pathlib import Path

from vlserve import VLPipeline

PICTURES = Path(__file__).parent / "pictures"
TURNS = (
    ("How many shapes are there?", "shapes.png"),
    ("Describe the picture.", None),
    ("星形是什么颜色？", None),
    ("And where is it?", None),
    ("哪根柱子最高？", "chart.png"),
    ("How tall is bar B?", None),
    ("What word is written here?", "word.png"),
    ("谢谢！", None),
)


def main() -> None:
    messages: list = []
    with VLPipeline() as pipe:
        for text, name in TURNS:
            parts = [{"type": "text", "text": text}]
            if name:
                parts.insert(0, {"type": "image", "image": PICTURES / name})
                print(f"![{name}](../examples/pictures/{name})\n")
            messages.append({"role": "user", "content": parts})
            answer = pipe(messages, max_tokens=96).text
            messages.append({"role": "assistant", "content": answer})
            print(f"> {text}\n\n`{answer}`\n")


if __name__ == "__main__":
    main()
