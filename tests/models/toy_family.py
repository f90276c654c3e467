"""A family that differs from the built-in ones in everything the seam allows, added through the seam alone.

Pictures keep their size: one unit a picture, a feature for each patch of 4 x 4 pixels. Placeholders have a mark at the end of
every row of patches, positions have three parts, features two levels, of which the second enters behind the first decoder layer,
and the decoder has layers of four kinds: full attention, attention in a window before two experts, and a recurrent layer, whose
cache is a state for each block. `Reference` is the same model in plain torch, written without the seam.
Shapes: F features, C hidden size, T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn

from tests.checkpoints import make_tokenizer
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.formats import Slot
from vlserve.llm.kv_cache import CacheKind
from vlserve.llm.layer import FeedForward, LayerKind, Mixer
from vlserve.llm.layer_kinds import LAYER_KINDS
from vlserve.llm.linear import ColumnParallelLinear, Linear, RowParallelLinear
from vlserve.llm.mlp import DenseMLP
from vlserve.llm.sliding_attention import SlidingAttention
from vlserve.llm.tensor_parallel import Split
from vlserve.models.architecture import (
    Architecture,
    Config,
    Detail,
    Features,
    Files,
    Layout,
    Placeholder,
    Positions,
    Preprocessor,
    Span,
    Vocabulary,
)
from vlserve.models.base import Model
from vlserve.vision.pixels import Pixels, Unit
from vlserve.vision.tower import Tower

if TYPE_CHECKING:
    from vlserve.llm.weights import Target

PATCH, LEVELS, WINDOW = 4, 2, 5
PICTURE, ROW, END = "<picture>", "<row>", "</picture>"
AXES = (0, 1, 2, 0, 1, 2, 0, 1)  # of the eight frequencies of a head
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<picture>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "intermediate_size": 50,  # divides by no degree but 1, 2, 5, ...
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention", "sliding_experts", "running_mean", "full_attention"],
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class ToyPreprocessor(Preprocessor):
    picture_id: int

    def placeholders(self) -> Mapping[str, Placeholder]:
        return {"image": Placeholder(PICTURE, self.picture_id)}

    def control_tokens(self) -> tuple[str, ...]:
        return PICTURE, ROW, END

    def prepare(self, image: Image.Image, detail: Detail) -> Pixels:
        columns, rows = _patches(image.width, image.height)
        resized = image.resize((columns * PATCH, rows * PATCH))
        numbers = np.ascontiguousarray(np.array(resized).transpose(2, 0, 1))  # [3, H, W]
        digest = hashlib.blake2b(numbers.tobytes() + repr(numbers.shape).encode(), digest_size=32).digest()
        return Pixels(data=numbers.reshape(-1), units=(Unit(numbers.shape, rows * columns),), digest=digest)

    def count_features(self, width: int, height: int, detail: Detail) -> int:
        columns, rows = _patches(width, height)
        return rows * columns

    def most_features(self) -> int:
        return 64

    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        rows, columns = _grid(pixels)
        row: list[int | Features] = [Features(columns, self.picture_id), vocabulary.token_id(ROW)]
        return Layout.of([*row * rows, vocabulary.token_id(END)])

    def positions(self, token_ids: Sequence[int], spans: Sequence[Span]) -> Positions:
        axes: tuple[list[int], ...] = ([], [], [])
        place, following = 0, 0
        for span in spans:
            rows, columns = _grid(span.pixels)
            for _ in range(span.start - place):
                _add(axes, following, following, following)
                following += 1
            for row in range(rows):
                for column in range(columns + 1):  # the mark stands behind the row's last patch
                    _add(axes, following, following + row, following + column)
            following += max(rows, columns + 1)
            place = span.start + rows * (columns + 1)
        for _ in range(len(token_ids) - place):
            _add(axes, following, following, following)
            following += 1
        return Positions(axes=axes, next=following)


class ToyTower(Tower):
    """A patch, and the mean of its picture, through a linear layer and tanh; then a linear layer for each level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * PATCH**2, width)
        self.levels_of = nn.ModuleList(nn.Linear(width, width) for _ in range(LEVELS))

    @property
    def levels(self) -> int:
        return LEVELS

    def cost(self, unit: Unit) -> float:
        return float(unit.num_features**2)

    def smallest(self) -> Unit:
        return Unit((3, PATCH, PATCH), 1)

    def heaviest(self) -> list[Unit]:
        return [Unit((3, 8 * PATCH, 8 * PATCH), 64)]

    def encode(self, pixels: torch.Tensor, units: Sequence[Unit]) -> torch.Tensor:
        weight, found = self.patch.weight, []
        for unit, numbers in zip(units, pixels.split([unit.num_bytes for unit in units]), strict=True):
            x = numbers.view(unit.shape).to(weight.device).to(weight.dtype) / 255
            x = x.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
            x = self.patch(x)
            x = torch.tanh(x + x.mean(0))
            found.append(torch.stack([level(x) for level in self.levels_of], 1))
        return torch.cat(found)

    def targets(self) -> dict[str, torch.Tensor]:
        return {f"tower.{name}": parameter.data for name, parameter in self.named_parameters()}


@dataclass(frozen=True)
class States(CacheKind):
    """Of a recurrent layer: its state behind the last token of each block that has been computed."""

    width: int

    def block_bytes(self, block_size: int, dtype: torch.dtype, kv_dtype: str) -> int:
        return self.width * 4

    def make(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
    ) -> tuple[Blocks, ...]:
        return (torch.empty(num_blocks, self.width, device=device),)


class RunningMean(Mixer):
    """h = a * h before + (1 - a) * in(x), then out(h), a number a for each channel; this rank's channels."""

    can_record = False

    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        span, width = split.query_heads(config.num_attention_heads, config.head_dim), config.num_attention_heads * config.head_dim
        self.in_proj = ColumnParallelLinear(config.hidden_size, {"in_proj": (span, width)}, bias=False)
        self.out_proj = RowParallelLinear("out_proj", span, width, config.hidden_size, bias=False, group=split.group)
        self.decay, self.slot = nn.Parameter(torch.empty(span.size), requires_grad=False), {0: span}
        self.cache_kind, self.width = States(span.size), width

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.in_proj.format.empty_sums(x)

    def forward(
        self,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[Blocks, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        (states,), given, size, decay = cache, self.in_proj(x, sums), metadata.block_size, self.decay.sigmoid()
        assert isinstance(states, torch.Tensor)
        out, row = torch.empty_like(given), 0
        for table, number, stop in zip(metadata.block_tables, metadata.query_lens, metadata.context_lens, strict=True):
            before = stop - number - 1
            state = states[table[before // size]].clone() if before >= 0 else states.new_zeros(len(decay))
            for place in range(stop - number, stop):
                state = decay * state + (1 - decay) * given[row]
                out[row] = state
                states[table[place // size]] = state
                row += 1
        return self.out_proj(out)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        yield "mixer.", self.in_proj
        yield "mixer.", self.out_proj

    def others(self) -> Iterator[tuple[str, Slot]]:
        yield "mixer.decay", Slot(self.decay.data, (self.width,), self.slot)


class TwoExperts(FeedForward):
    """Each token goes through the one of two experts that a router gives more."""

    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        self.experts = nn.ModuleList(DenseMLP(config, split) for _ in range(2))
        self.router = nn.Parameter(torch.empty(2, config.hidden_size), requires_grad=False)

    def empty_sums(self, x: torch.Tensor) -> None:
        return None

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        out, chosen = torch.empty_like(x), (x @ self.router.T).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):  # on every rank the same
                out[rows] = expert(x[rows], None)
        return out

    def linears(self) -> Iterator[tuple[str, Linear]]:
        for number, expert in enumerate(self.experts):
            assert isinstance(expert, DenseMLP)
            for names, linear in expert.linears():
                yield f"mlp.experts.{number}.{names.removeprefix('mlp.')}", linear

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "mlp.router.weight", self.router.data


KINDS = {
    **LAYER_KINDS,
    "sliding_experts": LayerKind(SlidingAttention, TwoExperts),
    "running_mean": LayerKind(RunningMean, DenseMLP),
}


def decoder_config(config: Config) -> DecoderConfig:
    text = config["text_config"]
    known = [kind if kind in LAYER_KINDS else "sliding_attention" for kind in text["layer_types"]]
    decoder = read_decoder_config(text | {"layer_types": known})
    return replace(decoder, mrope_axes=AXES, deep_layers=(0,), layer_types=tuple(text["layer_types"]))


def build(config: Config, preprocessor: ToyPreprocessor, split: Split) -> Model:
    decoder = decoder_config(config)
    return Model(Decoder(decoder, split, KINDS), ToyTower(decoder.hidden_size))


def preprocessor(config: Config, files: Files) -> ToyPreprocessor:
    return ToyPreprocessor(int(config["image_token_id"]))


TOY = Architecture(preprocessor=preprocessor, build=build, decoder=decoder_config)


def make_toy(folder: Path, layer_types: Sequence[str] = TEXT["layer_types"]) -> Path:
    """A random checkpoint."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (PICTURE, ROW, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = TEXT | {"vocab_size": tokenizer.get_vocab_size() + 1, "layer_types": layer_types}
    text["num_hidden_layers"] = len(layer_types)
    config = {"model_type": "toy", "text_config": text, "image_token_id": tokenizer.token_to_id(PICTURE)}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    whole = build(config, preprocessor(config, {}), Split())
    targets: dict[str, Target] = whole.targets()
    tensors = {}
    for name, target in targets.items():
        shape = tuple(target.shape) if isinstance(target, torch.Tensor) else target.full
        spread = torch.Size(shape[1:]).numel() ** -0.5
        tensors[name] = torch.randn(shape) * spread if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)
    save_file(tensors, folder / "model.safetensors")
    return folder


class Reference:
    """The whole model in plain torch: every token computed anew from all before it."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        self.text, self.picture_id = config["text_config"], config["image_token_id"]

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], images: Sequence[Image.Image], number: int) -> list[tuple[int, float, float]]:
        """(greedy token, its log-probability, its distance from the second best)."""
        known, found = list(ids), []
        for _ in range(number):
            best = self.logits(known, images).log_softmax(-1).topk(2)
            known.append(int(best.indices[0]))
            found.append((known[-1], float(best.values[0]), float(best.values[0] - best.values[1])))
        return found

    def logits(self, ids: Sequence[int], images: Sequence[Image.Image]) -> torch.Tensor:
        """Of what comes after `ids` [V]."""
        features = torch.cat([self.features(image) for image in images]) if images else torch.zeros(0, LEVELS, 48)
        x = self("language_model.model.embed_tokens.weight")[torch.tensor(ids)]
        rows = [i for i, id in enumerate(ids) if id == self.picture_id]
        x[rows] = features[:, 0]
        angles = self.angles(ids, images)
        for layer, kind in enumerate(self.text["layer_types"]):
            x = self.layer(x, layer, kind, angles)
            if layer == 0:
                x[rows] += features[:, 1]
        return self("language_model.lm_head.weight") @ self.norm(x[-1], "language_model.model.norm")

    def features(self, image: Image.Image) -> torch.Tensor:
        """[F, 2, C]"""
        columns, rows = -(-image.width // PATCH), -(-image.height // PATCH)
        pixels = np.array(image.resize((columns * PATCH, rows * PATCH)))
        patches = [
            torch.tensor(pixels[r : r + PATCH, c : c + PATCH]).permute(2, 0, 1).flatten() / 255
            for r in range(0, rows * PATCH, PATCH)
            for c in range(0, columns * PATCH, PATCH)
        ]
        x = torch.stack(patches) @ self("tower.patch.weight").T + self("tower.patch.bias")
        x = (x + x.mean(0)).tanh()
        return torch.stack([x @ self(f"tower.levels_of.{i}.weight").T + self(f"tower.levels_of.{i}.bias") for i in range(2)], 1)

    def angles(self, ids: Sequence[int], images: Sequence[Image.Image]) -> torch.Tensor:
        """[T, D/2], from where each token stands."""
        places: list[tuple[int, int, int]] = []
        left = list(images)
        following = i = 0
        while i < len(ids):
            if ids[i] != self.picture_id:
                places.append((following,) * 3)
                following, i = following + 1, i + 1
                continue
            image = left.pop(0)
            columns, rows = -(-image.width // PATCH), -(-image.height // PATCH)
            places += [(following, following + r, following + c) for r in range(rows) for c in range(columns + 1)]
            following, i = following + max(rows, columns + 1), i + rows * (columns + 1)
        frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        axis = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        return torch.tensor(places).float()[:, axis] * frequencies

    def layer(self, x: torch.Tensor, layer: int, kind: str, angles: torch.Tensor) -> torch.Tensor:
        name = f"language_model.model.layers.{layer}"
        y = self.norm(x, f"{name}.input_layernorm")
        if kind == "running_mean":
            x = x + self.recurrent(y, f"{name}.mixer")
        else:
            x = x + self.attention(y, name, angles, WINDOW if kind.startswith("sliding") else len(x))
        y = self.norm(x, f"{name}.post_attention_layernorm")
        if kind != "sliding_experts":
            return x + self.mlp(y, f"{name}.mlp")
        chosen = (y @ self(f"{name}.mlp.router.weight").T).argmax(-1)
        both = torch.stack([self.mlp(y, f"{name}.mlp.experts.{i}") for i in range(2)])
        return x + both[chosen, torch.arange(len(x))]

    def recurrent(self, y: torch.Tensor, name: str) -> torch.Tensor:
        given, decay = self.linear(y, f"{name}.in_proj"), self(f"{name}.decay").sigmoid()
        states, state = [], torch.zeros(len(decay))
        for row in given:
            state = decay * state + (1 - decay) * row
            states.append(state)
        return self.linear(torch.stack(states), f"{name}.out_proj")

    def mlp(self, y: torch.Tensor, name: str) -> torch.Tensor:
        gated = nn.functional.silu(self.linear(y, f"{name}.gate_proj")) * self.linear(y, f"{name}.up_proj")
        return self.linear(gated, f"{name}.down_proj")

    def attention(self, y: torch.Tensor, name: str, angles: torch.Tensor, window: int) -> torch.Tensor:
        q, k, v = (self.linear(y, f"{name}.self_attn.{part}_proj").unflatten(-1, (-1, 16)) for part in "qkv")
        q, k = (turn(self.norm(t, f"{name}.self_attn.{part}_norm"), angles) for part, t in (("q", q), ("k", k)))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 4
        distance = torch.arange(len(y))[:, None] - torch.arange(len(y))[None]
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        return self.linear(mixed, f"{name}.self_attn.o_proj")

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self(f"{name}.weight").T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self(f"{name}.weight")

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] by angles [T, D/2], as channel pairs (i, i + D/2)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :8], x[..., 8:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _patches(width: int, height: int) -> tuple[int, int]:
    return -(-width // PATCH), -(-height // PATCH)


def _grid(pixels: Pixels) -> tuple[int, int]:
    """Rows and columns of patches."""
    _, height, width = pixels.units[0].shape
    return height // PATCH, width // PATCH


def _add(axes: tuple[list[int], ...], *place: int) -> None:
    for axis, number in zip(axes, place, strict=True):
        axis.append(number)
