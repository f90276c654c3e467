"""Which tensor of one format is which of the other: names, and what is stored as one.

OpenGVLab's encoder has query, key and value in one tensor, and so has its InternLM2, which transformers knows as a Llama.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vlserve.llm.config import DecoderConfig
from vlserve.llm.stored_names import Part, Renamed, own_names

LANGUAGE = "language_model."
ALL_LLAMAS = ("internlm2", "internlm3")  # what transformers has no class for: a Llama's arithmetic
_EMBEDDINGS = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.weight": "patch_embeddings.projection.weight",
    "patch_embedding.bias": "patch_embeddings.projection.bias",
}
_IN_LAYER = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_QKV = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Piece:
    """What a tensor is in OpenGVLab's format: one whole, or the piece `place` of `number` that are stored one below the other."""

    name: str
    place: int = 0
    number: int = 1


def to_hf(name: str, decoder: DecoderConfig) -> Renamed:
    """OpenGVLab's name -> transformers', or the parts that it has; None for what transformers' model has no place for."""
    if name.startswith("vision_model.embeddings."):
        found = _EMBEDDINGS.get(name.removeprefix("vision_model.embeddings."))
        return f"vision_tower.embeddings.{found}" if found else None
    if match := re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", name):
        return _layer_to_hf(f"vision_tower.encoder.layer.{match[1]}.", match[2])
    if match := re.fullmatch(r"mlp1\.([013])\.(weight|bias)", name):
        return f"multi_modal_projector.{_PROJECTOR[match[1]]}.{match[2]}"
    if not name.startswith(LANGUAGE):
        return None
    inner = name.removeprefix(LANGUAGE)
    renamed = own_names(decoder)(inner) if decoder.model_type in ALL_LLAMAS else inner
    if isinstance(renamed, str):
        return LANGUAGE + renamed
    return [replace(part, name=LANGUAGE + part.name) for part in renamed or ()]


def to_original(name: str) -> Piece | None:
    """A name within transformers' model, or as it saves it -> OpenGVLab's."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.embeddings."):
        ours = {theirs: ours for ours, theirs in _EMBEDDINGS.items()}
        found = ours.get(name.removeprefix("vision_tower.embeddings."))
        return Piece(f"vision_model.embeddings.{found}") if found else None
    if match := re.fullmatch(r"vision_tower\.encoder\.layer\.(\d+)\.(.+)", name):
        return _layer_to_original(f"vision_model.encoder.layers.{match[1]}.", match[2])
    if match := re.fullmatch(r"multi_modal_projector\.(\w+)\.(weight|bias)", name):
        places = {module: place for place, module in _PROJECTOR.items()}
        return Piece(f"mlp1.{places[match[1]]}.{match[2]}") if match[1] in places else None
    inner = name.removeprefix(LANGUAGE)
    if inner == name and not name.startswith("lm_head."):
        return None
    return Piece(LANGUAGE + (inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"))


def _layer_to_hf(layer: str, inner: str) -> Renamed:
    if inner in ("ls1", "ls2"):
        return f"{layer}lambda_{inner[-1]}"
    module, _, kind = inner.rpartition(".")
    if module == "attn.qkv":
        return [Part(f"{layer}attention.{part}_proj.{kind}", ((i, i + 1),), len(_QKV)) for i, part in enumerate(_QKV)]
    return f"{layer}{_IN_LAYER[module]}.{kind}" if module in _IN_LAYER else None


def _layer_to_original(layer: str, inner: str) -> Piece | None:
    if match := re.fullmatch(r"lambda_([12])", inner):
        return Piece(f"{layer}ls{match[1]}")
    if match := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", inner):
        return Piece(f"{layer}attn.qkv.{match[2]}", _QKV.index(match[1]), len(_QKV))
    module, _, kind = inner.rpartition(".")
    found = next((ours for ours, theirs in _IN_LAYER.items() if theirs == module), None)
    return Piece(f"{layer}{found}.{kind}") if found else None
