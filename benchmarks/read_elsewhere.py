"""Whether others read a checkpoint as vlserve does: greedy tokens of the same questions about pictures, side by side.

    python benchmarks/read_elsewhere.py vlserve CHECKPOINT answers.json
    other-environment/bin/python benchmarks/read_elsewhere.py transformers CHECKPOINT answers.json
    other-environment/bin/python benchmarks/read_elsewhere.py vllm CHECKPOINT answers.json

The first asks held-out questions and keeps pictures and tokens in the file; the others ask the same, and exit with status 1 when
a token differs. transformers needs compressed-tensors, and for AWQ gptqmodel. CHECKPOINT is the demo model or made from it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 48
PROMPT = "<|im_start|>user\n<IMG_CONTEXT>\n{question}<|im_end|>\n<|im_start|>assistant\n"

Asked = list[dict[str, Any]]


def ask_vlserve(model: str, number: int, dtype: str) -> Asked:
    sys.path.insert(0, str(ROOT / "examples/demo_model"))
    from held_out import make_items

    from vlserve import VLPipeline

    items = [item for item in make_items(3 * number, seed=99) if len(item.images) == len(item.turns) == 1][:number]
    with VLPipeline(model, dtype=dtype) as pipe:
        answers = pipe([(item.turns[0], item.images[0]) for item in items], max_tokens=MAX_TOKENS, temperature=0.0)
    return [
        {
            "question": item.turns[0],
            "image": base64.b64encode(item.images[0]).decode(),
            "tokens": list(answer.token_ids),
            "text": answer.text,
        }
        for item, answer in zip(items, answers, strict=True)
    ]


def picture(asked: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(asked["image"]))).convert("RGB")


def ask_transformers(model: str, asked: Asked, dtype: str) -> list[list[int]]:
    import torch
    import transformers

    print(f"transformers {transformers.__version__}")
    reader = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    processor = transformers.AutoProcessor.from_pretrained(model)
    tokens = []
    for one in asked:
        inputs = processor(images=picture(one), text=PROMPT.format(question=one["question"]), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(reader.dtype)
        with torch.inference_mode():
            out = reader.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        tokens.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return tokens


def ask_vllm(model: str, asked: Asked, dtype: str) -> list[list[int]]:
    import vllm

    print(f"vllm {vllm.__version__}")
    reader = vllm.LLM(model=model, dtype=dtype, max_model_len=2048, limit_mm_per_prompt={"image": 1}, enforce_eager=True)
    requests = [{"prompt": PROMPT.format(question=one["question"]), "multi_modal_data": {"image": picture(one)}} for one in asked]
    outputs = reader.generate(requests, vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def without_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def compare(model: str, asked: Asked, tokens: list[list[int]]) -> int:
    end = json.loads((Path(model) / "generation_config.json").read_text())["eos_token_id"]
    different = 0
    for one, theirs in zip(asked, tokens, strict=True):
        ours, theirs = without_end(one["tokens"], end), without_end(theirs, end)
        if ours != theirs:
            different += 1
            print(f"{one['question']!r}: vlserve {ours} ({one['text']!r}), here {theirs}")
    print(f"{len(asked) - different} of {len(asked)} answers are the same, token for token")
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=("vlserve", "transformers", "vllm"))
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("answers", type=Path, help="JSON file that the first writes and the others read")
    parser.add_argument("--number", type=int, default=48, help="how many questions the first asks")
    parser.add_argument("--dtype", default="float32", help="float32, in which near ties are rare, or bfloat16")
    args = parser.parse_args()
    if args.reader == "vlserve":
        args.answers.write_text(json.dumps(ask_vlserve(args.model, args.number, args.dtype)))
        print(f"{args.number} answers are in {args.answers}")
        return 0
    asked = json.loads(args.answers.read_text())
    ask = {"transformers": ask_transformers, "vllm": ask_vllm}[args.reader]
    return compare(args.model, asked, ask(args.model, asked, args.dtype))


if __name__ == "__main__":
    sys.exit(main())
