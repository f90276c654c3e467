"""A SentencePiece model file (tokenizer.model) as tokenizer.json would describe it.

Read are the pieces, the kind of model and the normalizer; sentencepiece_model.proto names the fields. How a tokenizer is made of
them: LlamaConverter and SentencePieceExtractor of transformers.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlserve.errors import ModelError

BLANK = "\u2581"
BPE = 2  # of TrainerSpec.ModelType: Unigram is 1
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class PieceModel:
    """`pieces`: (text, score, kind), by id."""

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    charsmap: bytes  # how the text is normalised; empty: not at all
    adds_blank: bool  # in front of a text
    joins_blanks: bool


def read_piece_model(path: Path) -> PieceModel:
    """Raises ModelError for a file that is none."""
    try:
        fields = list(_fields(path.read_bytes()))
        trainer, normalizer = (dict(_fields(next((v for k, v in fields if k == key), b""))) for key in (2, 3))
        pieces = tuple(_piece(dict(_fields(value))) for key, value in fields if key == 1)
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise ModelError(f"{path}: no SentencePiece model, or a damaged one: {error}") from error
    if not pieces:
        raise ModelError(f"{path}: no SentencePiece model: it has no pieces")
    return PieceModel(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        charsmap=normalizer.get(2, b""),
        adds_blank=bool(normalizer.get(3, True)),
        joins_blanks=bool(normalizer.get(4, True)),
    )


def describe(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer.json would have but for the added tokens; `settings` is tokenizer_config.json. Raises ModelError."""
    model = read_piece_model(path)
    if model.model_type != BPE:
        raise ModelError(f"{path}: only SentencePiece models of kind BPE are read; save the tokenizer with transformers")
    vocab = {piece: id for id, (piece, _, _) in enumerate(model.pieces)}
    is_legacy = settings.get("legacy", True) is not False
    adds_blank = model.adds_blank and settings.get("add_prefix_space") is not False
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.joins_blanks:
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A[ {BLANK}]+|[ {BLANK}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": f"[ {BLANK}]{{2,}}"}, "content": " "})
    metaspace = None
    if is_legacy:
        steps += [{"type": "Prepend", "prepend": BLANK}] * adds_blank
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": BLANK})
    else:
        scheme = "first" if adds_blank else "never"
        metaspace = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": False}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * adds_blank
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": metaspace,
        "post_processor": _beginning(settings, vocab),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((piece for piece, _, kind in model.pieces if kind == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for _, _, kind in model.pieces),
            "vocab": vocab,
            "merges": _merges(model, vocab),
        },
    }


def special_pieces(path: Path) -> list[dict[str, Any]]:
    """Pieces that stand for no text of their own, and those that are never cut, as tokenizer.json lists added tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": id, "content": piece, **flags, "special": kind != USER_DEFINED}
        for id, (piece, _, kind) in enumerate(read_piece_model(path).pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _beginning(settings: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """The BOS token in front of any text, unless the settings say no."""
    given = settings.get("bos_token", "<s>")
    bos = given.get("content") if isinstance(given, Mapping) else given
    if settings.get("add_bos_token", True) is False or not isinstance(bos, str) or bos not in vocab:
        return None
    start, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
    }


def _merges(model: PieceModel, vocab: Mapping[str, int]) -> list[list[str]]:
    """Every way to put a piece together from two others; better scores first, as SentencePiece does it."""
    found = []
    for piece, score, kind in model.pieces:
        if kind != NORMAL:
            continue
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(-score, -len(left), -len(right), left, right) for left, right in pairs if left in vocab and right in vocab]
    found.sort(key=lambda one: one[:3])
    return [[left, right] for *_, left, right in found]


def _piece(fields: Mapping[int, Any]) -> tuple[str, float, int]:
    return fields.get(1, b"").decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = {1: (8, at), 5: (4, at)}[kind] if kind in (1, 5) else _varint(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError(f"unexpected bytes at {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"unexpected bytes at {at}")
