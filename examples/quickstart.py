"""Ask the model in the box about a picture, from Python. Run it from anywhere: `python examples/quickstart.py`."""

from pathlib import Path

from vlserve import VLPipeline

PICTURE = Path(__file__).parent / "pictures" / "shapes.png"

with VLPipeline() as pipe:
    for question in (
        "How many shapes are there?",
        "Is there a blue square?",
        "Describe the picture.",
    ):
        print(f"{question:28} {pipe((question, PICTURE), max_tokens=32).text}")
    for delta in pipe.stream(("What shape is the red one?", PICTURE), max_tokens=16):
        print(delta.text, end="", flush=True)
    print()
