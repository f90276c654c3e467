"""Times decoding of a mixture of experts on the CPU against transformers: tokens a second, in turns.

The model has random weights in the shape of Qwen3-30B-A3B's layers, of which a few are taken, with a vocabulary that is smaller
in the same proportion. transformers decodes with its own cache, a step a call, in each of its ways to compute experts. In float32
the greedy tokens of all are compared. Ratios are medians of the pairs of one turn; the last line is one JSON document.

    python benchmarks/bench_experts.py --layers 4 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import Add
from vlserve.models.checkpoint import DEMO

LAYERS, VOCABULARY = 48, 151_936
WAYS = ("eager", "batched_mm", "grouped_mm")
PROMPT = 16  # tokens


def make_model(folder: Path, num_layers: int, dtype: torch.dtype) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY * num_layers // LAYERS,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype=dtype,
    )
    torch.set_default_dtype(dtype)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for path in DEMO.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@torch.inference_mode()
def decode_theirs(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
    """(tokens a second after each answer's first token, the answers) of prompts [B, L]."""
    cache, given, found, start = DynamicCache(config=model.config), prompts, [], 0.0
    for step in range(tokens):
        logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        given = logits[:, -1].argmax(-1, keepdim=True)
        found.append(given)
        start = start if step else time.perf_counter()
    return len(prompts) * (tokens - 1) / (time.perf_counter() - start), torch.cat(found, 1).tolist()


def decode_ours(engine: Engine, prompts: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
    """The same."""
    sampling = SamplingParams(ignore_eos=True)
    for id, ids in enumerate(prompts.tolist()):
        engine.add(Add(id=id, token_ids=ids, media=[], sampling=sampling, max_tokens=tokens), [])
    found: list[list[int]] = [[] for _ in prompts]
    start, before = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            if event.token_id is not None:
                found[event.id].append(event.token_id)
        if not start and all(found):
            start, before = time.perf_counter(), sum(map(len, found))
    return (sum(map(len, found)) - before) / (time.perf_counter() - start), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    results, (generator, size) = [], (torch.Generator().manual_seed(0), VOCABULARY * args.layers // LAYERS)
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name), args.layers, getattr(torch, args.dtype))
        model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=args.dtype).eval()
        engine = Engine(
            EngineConfig(model=str(folder), device="cpu", kv_cache_gib=0.25, max_model_len=1024, prefix_caching=False)
        )
    for batch in args.batches:
        prompts = torch.randint(size, (batch, PROMPT), generator=generator)
        rates: dict[str, list[float]] = {name: [] for name in ("vlserve", *WAYS)}
        for turn in range(-1, args.turns):  # the first warms up
            rate, answers = decode_ours(engine, prompts, args.tokens)
            rates["vlserve"] += [rate] if turn >= 0 else []
            for way in WAYS:
                model.set_experts_implementation(way)
                rate, theirs = decode_theirs(model, prompts, args.tokens)
                rates[way] += [rate] if turn >= 0 else []
                if args.dtype == "float32" and answers != theirs:
                    raise SystemExit(f"batch {batch}: answers differ from transformers' ({way})")
        ratios = {way: median(a / b for a, b in zip(rates["vlserve"], rates[way], strict=True)) for way in WAYS}
        row = {"batch": batch, "tokens_per_s": {name: round(median(found), 2) for name, found in rates.items()}}
        results.append(row | {"times_as_fast_as": {way: round(ratio, 2) for way, ratio in ratios.items()}})
        print(results[-1], flush=True)
    print(json.dumps({"machine": platform.machine(), "layers": args.layers, "dtype": args.dtype, "results": results}))


if __name__ == "__main__":
    main()
