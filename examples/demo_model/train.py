"""Trains the demo model from pictures that it draws, and writes it as a Hugging Face InternVL folder.

    python examples/demo_model/train.py --work /tmp/demo_training --out vlserve/demo

Everything follows from the seed: picture i is the same in every run. The run can be stopped at any
moment and started again with the same command; it continues from the last checkpoint in --work.
Several questions share one picture in a sample: each sees the picture and itself, never another
question, so the picture is encoded once for all of them. While training, a linear head on the image
tokens also names the colour and shape at each token's place; without it the encoder takes many times
longer to see anything. The head is not part of the finished model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from pictures import COLOURS, SHAPES, Thing, draw_scene
from questions import about, conversations

from vlserve.vision.config import ImageConfig
from vlserve.vision.preprocess import make_tiles, normalise
from vlserve.vision.tiling import Grid

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SPECIAL += ("<ref>", "</ref>", "<box>", "</box>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{ '<IMG_CONTEXT>\\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# Qwen2's pre-tokenizer pattern
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TILE, PATCH = 96, 8
IMAGE = ImageConfig(tile_size=TILE, tokens_per_tile=(TILE // PATCH // 2) ** 2, min_patches=1, max_patches=4)
QUESTIONS_PER_PICTURE = 5
AUXILIARY_WEIGHT = 0.5


def build_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over a sample of the questions and answers, special tokens at the end."""
    lines = []
    for i in range(4000):
        rng = random.Random(f"tokenizer-{seed}-{i}")
        _, things = draw_scene(rng, 0.0)
        lines += [text for talk in [*conversations(rng, things, 6), about(rng)] for turn in talk for text in turn]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    torch.manual_seed(seed)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    vocab = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=160,
            num_hidden_layers=4,
            num_attention_heads=5,
            intermediate_size=640,
            image_size=[TILE, TILE],
            patch_size=[PATCH, PATCH],
            attention_bias=True,
            norm_type="layer_norm",
            use_qk_norm=False,
            use_mean_pooling=True,
            layer_scale_init_value=1.0,
        ),
        text_config=Qwen2Config(
            vocab_size=vocab,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=640,
            max_position_embeddings=8192,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=pad,
            eos_token_id=end,
            pad_token_id=pad,
        ),
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=IMAGE.tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    # measured on a CPU: the fused attention's backward pass is half of a step at these small sizes
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    _initialise(model)
    with torch.no_grad():  # the default initialisation leaves these at zero
        embeddings = model.model.vision_tower.embeddings
        embeddings.cls_token.normal_(0, 0.02)
        embeddings.position_embeddings.normal_(0, 0.02)
    return model


def _initialise(model) -> None:
    """Scale by fan-in: the usual deviation of 0.02 is made for widths of thousands and starves narrow layers."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            deviation = module.weight[0].numel() ** -0.5
            if name.endswith(("projection_layer", "fc2", "o_proj", "down_proj")):  # eight of them add up in a residual
                deviation *= 8**-0.5
            torch.nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)


@dataclass(frozen=True, slots=True)
class Sample:
    ids: list[int]
    labels: list[int]  # -100 where nothing is learnt
    positions: list[int]
    parts: list[int]  # 0 for the shared beginning, k for the k-th question
    pixels: torch.Tensor | None  # [N, 3, S, S] uint8
    places: torch.Tensor | None  # [N, K, 2] the colour and shape at each image token, 0 for none


class Samples(torch.utils.data.IterableDataset):
    """Samples from `start` on, in order; `hardness(i)` sets how varied picture i is."""

    def __init__(self, tokenizer: Tokenizer, seed: int, start: int, end: int, ramp: tuple[int, int]) -> None:
        self.tokenizer, self.seed, self.start, self.end, self.ramp = tokenizer, seed, start, end, ramp

    def __iter__(self) -> Iterator[Sample]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(self.start + first, self.end, step):
            low, high = self.ramp
            hardness = 0.65 * min(1.0, max(0.0, (i - low) / (high - low)))
            yield make_sample(self.tokenizer, random.Random(f"picture-{self.seed}-{i}"), hardness)


def make_sample(tokenizer: Tokenizer, rng: random.Random, hardness: float) -> Sample:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pixels = places = None
    picture_ids: list[int] = []
    kind = rng.random()
    if kind < 0.03:
        talks = [about(rng) for _ in range(4)]
    else:
        image, things = draw_scene(rng, hardness)
        tiles = make_tiles(image, IMAGE)
        pixels = tiles.pixels
        places = label_places(things, image.width, image.height, tiles.grid)
        context = tokenizer.token_to_id("<IMG_CONTEXT>")
        picture_ids = [tokenizer.token_to_id("<img>"), *[context] * tiles.num_tokens, tokenizer.token_to_id("</img>")]
        talks = conversations(rng, things, QUESTIONS_PER_PICTURE)
    ids = encode("<|im_start|>user\n")
    close, answer_open = encode("<|im_end|>\n"), encode("<|im_start|>assistant\n")
    if picture_ids and kind < 0.15:  # the question before the picture; then the two cannot be shared
        talks = [rng.choice(talks)]
        ids += encode(talks[0][0][0]) + picture_ids + encode("\n")
    elif picture_ids:
        ids += picture_ids + encode("\n")
    question_first = bool(picture_ids) and kind < 0.15
    labels, parts, positions = [-100] * len(ids), [0] * len(ids), list(range(len(ids)))
    begin = len(ids)
    for part, talk in enumerate(talks, start=1):
        piece: list[int] = []
        learn: list[int] = []
        for n, (question, answer) in enumerate(talk):
            ask = ([] if n == 0 else encode("\n<|im_start|>user\n")) + ([] if n == 0 and question_first else encode(question))
            ask += close + answer_open
            reply = encode(answer) + encode("<|im_end|>")
            piece += ask + reply
            learn += [-100] * len(ask) + reply
        ids += piece
        labels += learn
        parts += [part] * len(piece)
        positions += range(begin, begin + len(piece))
    return Sample(ids, labels, positions, parts, pixels, places)


def label_places(things: list[Thing], width: int, height: int, grid: Grid) -> torch.Tensor:
    """For each tile and image token, which colour and shape (counted from 1) is there; [N, K, 2]."""
    side = round(IMAGE.tokens_per_tile**0.5)
    boxes = [(c, r, grid.columns, grid.rows) for r in range(grid.rows) for c in range(grid.columns)]
    if grid.num_tiles > 1:
        boxes.append((0, 0, 1, 1))
    labels = torch.zeros(len(boxes), side, side, 2, dtype=torch.long)
    short = min(width, height)
    centres = (torch.arange(side) + 0.5) / side
    for n, (column, row, columns, rows) in enumerate(boxes):
        x = (column + centres) / columns * width / short
        y = (row + centres) / rows * height / short
        for thing in things:
            distance = ((x[None, :] - thing.x) ** 2 + (y[:, None] - thing.y) ** 2).sqrt()
            inside = distance < thing.radius * 0.85
            cell = (x[1] - x[0]).item(), (y[1] - y[0]).item()  # at least the token that holds the middle
            inside |= ((x[None, :] - thing.x).abs() <= cell[0] / 2) & ((y[:, None] - thing.y).abs() <= cell[1] / 2)
            labels[n][inside] = torch.tensor([1 + list(COLOURS).index(thing.colour), 1 + SHAPES.index(thing.shape)])
    return labels.flatten(1, 2)


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pads to the longest; the mask lets a token see the beginning and its own question only."""
    length = max(len(s.ids) for s in samples)
    batch = {
        "ids": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), -100),
        "positions": torch.zeros(len(samples), length, dtype=torch.long),
        "parts": torch.full((len(samples), length), -1),
    }
    for row, s in enumerate(samples):
        for key, values in (("ids", s.ids), ("labels", s.labels), ("positions", s.positions), ("parts", s.parts)):
            batch[key][row, : len(values)] = torch.tensor(values)
    parts = batch.pop("parts")
    same = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    batch["mask"] = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    batch["pixels"] = torch.cat([s.pixels for s in samples if s.pixels is not None])
    batch["places"] = torch.cat([s.places for s in samples if s.places is not None])
    return batch


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
    from safetensors import safe_open

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


def export(model, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that `transformers.AutoModelForImageTextToText` and `AutoProcessor` load."""
    from transformers import GenerationConfig, InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": TILE, "width": TILE}
    text = model.config.text_config
    model = model.to(torch.bfloat16).cpu().eval()
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False)
    model.save_pretrained(out)
    path = out / "config.json"  # stored in bfloat16 for its size, meant to be computed in float32
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=text.max_position_embeddings,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    image_processor = GotOcr2ImageProcessor(
        size=size,
        crop_to_patches=True,
        min_patches=IMAGE.min_patches,
        max_patches=IMAGE.max_patches,
        image_mean=list(IMAGE.mean),
        image_std=list(IMAGE.std),
    )
    processor = InternVLProcessor(
        image_processor=image_processor,
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=fast,
        image_seq_length=IMAGE.tokens_per_tile,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)
    image_processor.save_pretrained(out)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1e-3)
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
    total = args.steps * args.batch
    samples = Samples(tokenizer, args.seed, step * args.batch, total, (round(total * 0.15), round(total * 0.35)))
    loader = torch.utils.data.DataLoader(
        samples, batch_size=args.batch, num_workers=args.workers, collate_fn=collate, prefetch_factor=6
    )
    bar = tqdm(total=args.steps, initial=step, mininterval=5)
    sums, count, saved = [0.0, 0.0, 0.0], 0, time.monotonic()
    for batch in loader:
        warm = min(1.0, (step + 1) / 150)
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, auxiliary, hits = losses_and_hits(model, head, batch, image_token)
        optimiser.zero_grad()
        (loss + AUXILIARY_WEIGHT * auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        sums, count = [a + b.item() for a, b in zip(sums, (loss, auxiliary, hits), strict=True)], count + 1
        bar.update()
        if count == 25 or step == args.steps:
            row = {"step": step} | {k: total / count for k, total in zip(("loss", "places", "hits"), sums, strict=True)}
            log.append(row)
            bar.set_postfix({key: f"{value:.3f}" for key, value in row.items() if key != "step"})
            sums, count = [0.0, 0.0, 0.0], 0
        if time.monotonic() - saved > 120 or step == args.steps:
            save_checkpoint(args.work, model, optimiser, step, log)
            saved = time.monotonic()
    del model.place_head
    export(model, tokenizer, args.out)
    plot(log, args.work / "curve.png")


if __name__ == "__main__":
    main()
