"""Trains the demo model from pictures that it draws, and writes it as a Hugging Face InternVL folder.

    python examples/demo_model/train.py --work /tmp/demo_training --out vlserve/demo

Everything follows from the seed: picture i is the same in every run. The run can be stopped at any
moment and started again with the same command; it continues from the last checkpoint in --work.
While training, a linear head on the image tokens also names the colour and shape at each token's place;
without it the encoder takes many times longer to see anything. The head is not part of the finished model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from model import IMAGE, build_model, build_tokenizer, export
from pictures import COLOURS, SHAPES
from samples import Samples, collate

from vlserve.vision.preprocess import normalise

AUXILIARY_WEIGHT = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3250)
    parser.add_argument("--language-steps", type=int, default=330, help="further steps, on hard questions, with a frozen encoder")
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.seed).to(args.device).train()
    image_token = tokenizer.token_to_id("<IMG_CONTEXT>")
    head = torch.nn.Linear(model.config.text_config.hidden_size, 2 + len(COLOURS) + len(SHAPES)).to(args.device)
    model.place_head = head  # so that checkpoints hold it; removed before the model is written
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    step, log = load_checkpoint(args.work, model, optimiser)
    total, all_steps = args.steps * args.batch, args.steps + args.language_steps
    ramp = (round(total * 0.15), round(total * 0.35))
    samples = Samples(tokenizer, args.seed, step * args.batch, all_steps * args.batch, ramp, hard_from=total)
    loader = torch.utils.data.DataLoader(
        samples, batch_size=args.batch, num_workers=args.workers, collate_fn=collate, prefetch_factor=6
    )
    bar = tqdm(total=all_steps, initial=step, mininterval=5)
    sums, count, saved = [0.0, 0.0, 0.0], 0, time.monotonic()
    for batch in loader:
        if step >= args.steps and head.weight.requires_grad:
            head.requires_grad_(False)
            model.model.vision_tower.requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(False)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.language_steps, args.lr)
        loss, auxiliary, hits = losses_and_hits(model, head, batch, image_token)
        optimiser.zero_grad()
        (loss + AUXILIARY_WEIGHT * auxiliary if head.weight.requires_grad else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        sums, count = [a + b.item() for a, b in zip(sums, (loss, auxiliary, hits), strict=True)], count + 1
        bar.update()
        if count == 25 or step == all_steps:
            row = {"step": step} | {k: total / count for k, total in zip(("loss", "places", "hits"), sums, strict=True)}
            log.append(row)
            bar.set_postfix({key: f"{value:.3f}" for key, value in row.items() if key != "step"})
            sums, count = [0.0, 0.0, 0.0], 0
        if time.monotonic() - saved > 120 or step == all_steps:
            save_checkpoint(args.work, model, optimiser, step, log)
            saved = time.monotonic()
    del model.place_head
    export(model, tokenizer, args.out)
    plot(log, args.work / "curve.png")


def learning_rate(step: int, steps: int, language_steps: int, peak: float) -> float:
    """Warm-up, then a cosine to a fiftieth of the peak; once more, from half the peak, for the language steps."""
    if step >= steps:
        step, steps, peak, warm = step - steps, language_steps, peak / 2, 30
    else:
        warm = 150
    return peak * min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def losses_and_hits(model, head: torch.nn.Linear, batch: dict[str, torch.Tensor], image_token: int) -> tuple[torch.Tensor, ...]:
    """Mean cross-entropy over answer tokens and over places, and how many answer tokens were the most likely one."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    mean, std = (torch.tensor(v, device=device) for v in (IMAGE.mean, IMAGE.std))
    pixels = normalise(batch["pixels"], mean, std)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        features = model.model.get_image_features(pixel_values=pixels).pooler_output
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
        x = model.get_input_embeddings()(batch["ids"])
        x = x.masked_scatter((batch["ids"] == image_token)[..., None], features.flatten(0, -2).to(x.dtype))
        mask = torch.zeros(batch["mask"].shape, dtype=torch.bfloat16, device=device)
        mask = mask.masked_fill(~batch["mask"], torch.finfo(torch.bfloat16).min)
        hidden = model.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=batch["positions"], use_cache=False
        )
        targets = batch["labels"][:, 1:]
        keep = targets != -100
        logits = model.lm_head(hidden.last_hidden_state[:, :-1][keep])
        colour, shape = head(features).float().flatten(0, 1).split((1 + len(COLOURS), 1 + len(SHAPES)), dim=-1)
    logits, targets = logits.float(), targets[keep]
    places = batch["places"].flatten(0, 1)
    auxiliary = sum(
        F.cross_entropy(part, places[:, i], weight=torch.tensor([0.2] + [1.0] * (part.shape[-1] - 1), device=device))
        for i, part in enumerate((colour, shape))
    )
    return F.cross_entropy(logits, targets), auxiliary, (logits.argmax(-1) == targets).float().mean()


def save_checkpoint(work: Path, model, optimiser: torch.optim.AdamW, step: int, log: list[dict[str, float]]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            tensors[f"{key}.{names[id(parameter)]}"] = value.detach().clone()
    work.mkdir(parents=True, exist_ok=True)
    save_file(tensors, work / "next.safetensors", metadata={"step": str(step), "log": json.dumps(log)})
    os.replace(work / "next.safetensors", work / "checkpoint.safetensors")


def load_checkpoint(work: Path, model, optimiser: torch.optim.AdamW) -> tuple[int, list[dict[str, float]]]:
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"model.{name}"])
        optimiser.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(meta["step"]), json.loads(meta["log"])


def plot(log: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in log]
    figure, left = pyplot.subplots(figsize=(7, 3.5))
    left.plot(steps, [row["loss"] for row in log], color="tab:red")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="tab:red")
    left.set_yscale("log")
    right = left.twinx()
    right.plot(steps, [row["hits"] for row in log], color="tab:blue")
    right.set_ylabel("answer tokens right", color="tab:blue")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
