"""A tokenizer as tokenizer.json describes it, also for checkpoints that have only the files it is made from.

Source of the conversion of vocab.json with merges.txt: Qwen2Tokenizer of transformers 5.23.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlserve.errors import ModelError
from vlserve.models.sentencepiece_files import describe, special_pieces

MODEL, PIECES = "tokenizer.json", "tokenizer.model"
VOCABULARY, MERGES, ADDED, SETTINGS = "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_description(folder: Path) -> dict[str, Any]:
    """What is in tokenizer.json, or would be; raises ModelError naming the file that is missing or wrong."""
    path = folder / MODEL
    if path.exists():
        return _read_json(path)
    settings = read_settings(folder)
    if (folder / PIECES).exists():
        return describe(folder / PIECES, settings) | {"added_tokens": added_tokens(folder)}
    if not (folder / VOCABULARY).exists():
        raise ModelError(f"{folder}: checkpoint file missing: {MODEL} (or {PIECES}, or {VOCABULARY} with {MERGES})")
    kind = settings.get("tokenizer_class")
    if kind not in QWEN2:
        raise ModelError(
            f"{folder}: {MODEL} is missing, and of tokenizers with a {VOCABULARY} only {QWEN2[0]} can be read; {SETTINGS} says "
            f"tokenizer_class {kind!r}. Save the tokenizer with transformers to make one"
        )
    return _qwen2(_read_json(folder / VOCABULARY), _read_merges(folder / MERGES), added_tokens(folder))


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; {} where there is none."""
    path = folder / SETTINGS
    return _read_json(path) if path.exists() else {}


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Tokens beside the vocabulary, as tokenizer.json lists them, by id: those of tokenizer_config.json, else
    added_tokens.json's; and a SentencePiece model's own."""
    settings, path = read_settings(folder), folder / ADDED
    decoder = settings.get("added_tokens_decoder")
    found = {token["id"]: token for token in special_pieces(folder / PIECES)} if (folder / PIECES).exists() else {}
    if isinstance(decoder, Mapping):
        found |= {int(id): dict(entry) for id, entry in decoder.items()}
    elif path.exists():
        named = [*settings.get("additional_special_tokens", ()), *(settings.get(f"{place}_token") for place in NAMED)]
        special = {token["content"] if isinstance(token, Mapping) else token for token in named}
        found |= {id: {"content": name, "special": name in special} for name, id in _read_json(path).items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return [{"id": id, **flags, **found[id]} for id in sorted(found)]


def _qwen2(vocab: Mapping[str, int], merges: list[str], added: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocab),
            "merges": merges,
        },
    }


def _read_merges(path: Path) -> list[str]:
    if not path.exists():
        raise ModelError(f"{path.parent}: checkpoint file missing: {path.name}")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value
