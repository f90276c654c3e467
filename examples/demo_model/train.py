"""Trains the demo model from pictures that it draws, and writes it as a Hugging Face InternVL folder.

    pip install -e . matplotlib -r examples/demo_model/fonts.txt
    python examples/demo_model/train.py --work /tmp/demo_training --out vlserve/demo

Everything follows from the seed: picture i is the same in every run. The run can be stopped at any moment and started again
with the same command; it continues from the last checkpoint in --work. First the encoder alone learns to name what is at each
image token; then both learn to answer. Pictures are never used twice, so the accuracy that is logged by task and language is
of questions that were not seen before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parent))
from curves import plot
from labels import CLASSES
from model import IMAGE, build_model, build_tokenizer, export
from optimiser import Optimiser
from pointing import Pointing
from row import TASKS
from samples import Samples, collate, collate_pictures
from world import LANGUAGES

from vlserve.vision.preprocess import normalise

LOG_EVERY = 25
SAVE_EVERY_S = 60
WARM_UP = 60


class PlaceHead(torch.nn.Linear):
    """Names what is at an image token; a help in training that the finished model does not have."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sum(CLASSES.values()) + 4)

    def loss(self, features: torch.Tensor, classes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Features [N, K, C], classes [N, K, 8], boxes [N, K, 4]: the cross-entropies' sum and the boxes' distance."""
        *logits, box = self(features).float().flatten(0, 1).split((*CLASSES.values(), 4), dim=-1)
        classes, boxes = classes.flatten(0, 1), boxes.flatten(0, 1)
        known = ~boxes[:, 0].isnan()
        total = F.smooth_l1_loss(box[known], boxes[known], beta=0.05) * 8 if known.any() else box.sum() * 0
        for i, part in enumerate(logits):
            losses, something = F.cross_entropy(part, classes[:, i], reduction="none"), classes[:, i] > 0
            total = total + 0.5 * losses[~something].mean()
            if something.any():  # by itself, since most tokens hold nothing
                total = total + losses[something].mean()
        return total


@dataclass
class Run:
    """A training run: the model, what helps it, and how far it is."""

    args: argparse.Namespace

    def __post_init__(self) -> None:
        start: Path | None = self.args.start
        self.tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else build_tokenizer(self.args.seed)
        self.model = build_model(self.tokenizer, self.args.seed).train()
        if start:
            self.model.load_state_dict(AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).state_dict())
        self.model.place_head = PlaceHead(self.model.config.text_config.hidden_size)  # removed before the model is written
        self.model.to(self.args.device, torch.bfloat16)
        self.pointing = Pointing(self.model)
        if self.args.encoder:
            self.take_encoder(self.args.encoder)
        self.optimiser = Optimiser(self.model, self.args.lr)
        self.image_token = self.tokenizer.token_to_id("<IMG_CONTEXT>")
        self.encoder_from = self.args.vision_steps + round(self.args.steps * self.args.encoder_rests)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        path = self.args.work / "checkpoint.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["run"])
            self.optimiser.load(load_file(path, device=str(self.args.device)))
            self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]

    def save(self) -> None:
        self.args.work.mkdir(parents=True, exist_ok=True)
        run = {"step": self.step, "seconds": self.seconds, "log": self.log}
        tensors = {name: value.contiguous() for name, value in self.optimiser.state().items()}
        save_file(tensors, self.args.work / "next.safetensors", metadata={"run": json.dumps(run)})
        os.replace(self.args.work / "next.safetensors", self.args.work / "checkpoint.safetensors")

    def encoder_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What the first stage trains."""
        parts = ("model.vision_tower.", "model.multi_modal_projector.", "place_head.")
        return {name: p for name, p in self.model.named_parameters() if name.startswith(parts)}

    def save_encoder(self) -> None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.encoder_parameters().items()}
        save_file(tensors, self.args.work / "encoder.safetensors")

    def take_encoder(self, path: Path) -> None:
        """Begin with an encoder that `save_encoder` wrote; only its head for places if a whole model is begun with."""
        stored = load_file(path)
        with torch.no_grad():
            for name, p in self.encoder_parameters().items():
                if name.startswith("place_head.") or not self.args.start:
                    p.copy_(stored[name])

    def batches(self) -> Iterable[dict[str, torch.Tensor]]:
        """What is left of the encoder's steps, then of the answers'."""
        args = self.args
        if self.step < args.vision_steps:
            size, seen = args.vision_batch, self.step * args.vision_batch
            data = Samples(self.tokenizer, args.seed, seen, args.vision_steps * size, pictures_only=True, crowded=args.crowded)
            yield from self._loader(data, size, collate_pictures)
        answered = max(0, self.step - args.vision_steps)
        data = Samples(self.tokenizer, args.seed, answered * args.batch, args.steps * args.batch)
        yield from self._loader(data, args.batch, collate)

    def _loader(self, data: Samples, size: int, collate_fn: Any) -> Iterable[dict[str, torch.Tensor]]:
        workers = self.args.workers
        return torch.utils.data.DataLoader(
            data, batch_size=size, num_workers=workers, collate_fn=collate_fn, prefetch_factor=4 if workers else None
        )

    def share(self) -> float:
        """Of the full learning rate: warm-up, level, and a line down to nought over the last part; for both stages alike."""
        args = self.args
        step, steps = (
            (self.step, args.vision_steps) if self.step < args.vision_steps else (self.step - args.vision_steps, args.steps)
        )
        down = args.cool_down if self.step >= args.vision_steps else 0.3
        return min(1.0, (step + 1) / WARM_UP, max(0.02, (steps - step) / (steps * down)))

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
        """The parts of the loss, and by task and language how many answers are right as a whole, of how many."""
        batch = {key: value.to(self.args.device, non_blocking=True) for key, value in batch.items()}
        mean, std = (torch.tensor(v, device=self.args.device) for v in (IMAGE.mean, IMAGE.std))
        pixels = normalise(batch["pixels"], mean, std).to(torch.bfloat16)
        features = self.model.model.get_image_features(pixel_values=pixels).pooler_output
        features = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
        features = features.reshape(len(pixels), -1, features.shape[-1])
        parts = {"places": self.model.place_head.loss(features, batch["classes"], batch["boxes"])}
        if "ids" not in batch:
            return parts, {}
        x = self.model.get_input_embeddings()(batch["ids"])
        x = x.masked_scatter((batch["ids"] == self.image_token)[..., None], features.flatten(0, 1).to(x.dtype))
        mask = torch.zeros(batch["mask"].shape, dtype=x.dtype, device=x.device).masked_fill(~batch["mask"], -1e30)
        hidden = self.model.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=batch["positions"], use_cache=False
        )
        targets = batch["labels"][:, 1:]
        keep = targets != -100
        logits = self.model.lm_head(hidden.last_hidden_state[:, :-1][keep]).float()
        parts |= {"answers": F.cross_entropy(logits, targets[keep]), "looks": self.pointing.loss(batch["looks"])}
        right = torch.ones(len(batch["kinds"]), device=x.device)
        right.scatter_reduce_(0, batch["turns"][:, 1:][keep], (logits.argmax(-1) == targets[keep]).float(), "amin")
        hits: dict[str, list[int]] = {}
        for kind, hit in zip(batch["kinds"].tolist(), right.tolist(), strict=True):
            entry = hits.setdefault(f"{TASKS[kind // 2]} {LANGUAGES[kind % 2]}", [0, 0])
            entry[0] += int(hit)
            entry[1] += 1
        return parts, hits

    def train(self) -> None:
        args, saved = self.args, time.monotonic()
        total = args.vision_steps + args.steps
        bar = tqdm(total=total, initial=self.step, mininterval=5, dynamic_ncols=True)
        sums: dict[str, list[float]] = {}
        begun = time.monotonic()
        for batch in self.batches():
            self.model.model.vision_tower.requires_grad_(not self.args.vision_steps <= self.step < self.encoder_from)
            parts, hits = self.losses(batch)
            loss = parts["places"] if len(parts) == 1 else parts["answers"] + 0.15 * parts["places"] + args.looks * parts["looks"]
            loss.backward()
            share = self.share()
            self.optimiser.step(share * (args.encoder_lr if self.step >= args.vision_steps else 1), share)
            self.step += 1
            bar.update()
            self.seconds, begun = self.seconds + time.monotonic() - begun, time.monotonic()
            for key, value in parts.items():
                entry = sums.setdefault(key, [0.0, 0])
                entry[0], entry[1] = entry[0] + value.item(), entry[1] + 1
            for key, (right, number) in hits.items():
                entry = sums.setdefault(key, [0.0, 0])
                entry[0], entry[1] = entry[0] + right, entry[1] + number
            if self.step % LOG_EVERY == 0 or self.step == total:
                row = {key: round(a / b, 4) for key, (a, b) in sorted(sums.items())}
                self.log.append({"step": self.step, "seconds": round(self.seconds), **row})
                bar.set_postfix({key: f"{row[key]:.3f}" for key in ("answers", "looks", "places") if key in row})
                (args.work / "log.jsonl").open("a").write(json.dumps(self.log[-1]) + "\n")
                sums = {}
            if self.step == args.vision_steps:
                self.save_encoder()
            if time.monotonic() - saved > SAVE_EVERY_S or self.step == total:
                self.save()
                saved = time.monotonic()
        bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and curves, outside the repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--vision-steps", type=int, default=2600, help="steps for the encoder alone")
    parser.add_argument("--vision-batch", type=int, default=32, help="pictures in each of them")
    parser.add_argument("--crowded", type=float, default=0.8, help="share of crowded pictures among them")
    parser.add_argument(
        "--encoder",
        type=Path,
        help="begin with the encoder of an earlier run, its encoder.safetensors; with --start, only with its head for places",
    )
    parser.add_argument("--start", type=Path, help="begin with the weights and the tokenizer of a finished model: its folder")
    parser.add_argument("--steps", type=int, default=3750, help="steps with answers")
    parser.add_argument(
        "--batch", type=int, default=16, help="rows of about 300 tokens, with one to three pictures, in each of them"
    )
    parser.add_argument(
        "--cool-down", type=float, default=0.5, help="share of --steps over which the learning rate goes to nought"
    )
    parser.add_argument(
        "--encoder-rests",
        type=float,
        default=0.32,
        help="share of --steps in which only the projector and the language model learn",
    )
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument(
        "--encoder-lr", type=float, default=0.3, help="share of the learning rate for the encoder in steps with answers"
    )
    parser.add_argument("--looks", type=float, default=0.3, help="weight of where to look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    run = Run(args)
    run.train()
    plot(run.log, args.work / "curves.png")
    del run.model.place_head
    export(run.model, run.tokenizer, args.out)
    print(f"{run.seconds / 60:.0f} minutes; the model is in {args.out}, its curves in {args.work / 'curves.png'}")


if __name__ == "__main__":
    main()
