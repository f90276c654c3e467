"""Ranks one after another, without communication: each computes its part, and the test adds the parts up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.tensor_parallel import Group, Split


class Part(Group):
    """Rank `rank` of `size`, whose collectives hand back what it brought itself."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: torch.Tensor, kind: str) -> torch.Tensor | None:
        return x


def splits(tp: int, *, replicate_kv_heads: bool = False) -> list[Split]:
    return [Split(group=Part(rank, tp), replicate_kv_heads=replicate_kv_heads) for rank in range(tp)]


def random_text_config(rng: random.Random, tp: int) -> dict[str, Any]:
    """Of any kind, with sizes that need not divide; the heads do, or each KV head stays on several ranks."""
    kind = rng.choice(("llama", "mistral", "qwen2", "qwen3"))
    kv_heads = tp * rng.randint(1, 2) if rng.random() < 0.6 else rng.choice([n for n in range(1, tp + 1) if tp % n == 0])
    heads = kv_heads * rng.randint(1, 3) * (tp // kv_heads if kv_heads < tp else 1)
    return {
        "model_type": kind,
        "vocab_size": rng.randint(1, 40),
        "hidden_size": rng.randint(1, 9),
        "intermediate_size": rng.randint(1, 20),
        "num_hidden_layers": rng.randint(1, 2),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice((2, 4)),
        "max_position_embeddings": 16,
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
    }


def build(text: dict[str, Any], split: Split) -> Decoder:
    """As an engine does it; what is never written stays NaN."""
    with torch.device("meta"):
        decoder = Decoder(read_decoder_config(text), split)
    decoder = decoder.to_empty(device="cpu").requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.fill_(float("nan"))
    return decoder


def full_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Of the checkpoint's tensors, by name."""
    return {name: tuple(t.shape if isinstance(t, torch.Tensor) else t.full) for name, t in decoder.targets().items()}


def save_checkpoint(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors
