"""Which tokens end an answer: whatever a checkpoint's files call its end (eos) counts, since they often name different ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vlserve.errors import ModelError
from vlserve.models.tokenizer_files import added_tokens

HARMONY = ("<|return|>", "<|call|>")  # of an answer; <|end|> ends one of its messages


def find_end_tokens(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any], others: Iterable[str] = ()
) -> frozenset[int]:
    """Ids of every eos_token_id in generation_config.json and config.json (top and the text's), an integer or a list, of the
    tokenizer's eos_token, and of `others`; and those of GPT-OSS, whose first files lack one. Null, -1 and a token that the
    vocabulary lacks name none. Raises ModelError for other values."""
    places = {"generation_config.json: eos_token_id": generation, "config.json: eos_token_id": config}
    for section in ("text_config", "llm_config"):
        if isinstance(config.get(section), Mapping):
            places[f"config.json: {section}.eos_token_id"] = config[section]
    ids = {id for place, values in places.items() for id in _read_ids(values.get("eos_token_id"), f"{folder.name}: {place}")}
    names = {
        _content(_read_json(folder / name).get("eos_token")) for name in ("tokenizer_config.json", "special_tokens_map.json")
    }
    if any(config.get("model_type") == "gpt_oss" for config in (config, *places.values())):
        names |= set(HARMONY)
    return frozenset(
        {id for id in ids if id >= 0} | _ids_of(folder, {name for name in {*names, *others} if isinstance(name, str)})
    )


def _read_ids(value: Any, place: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ModelError(f"{place} is {repr(value)[:100]}; expected a token id, a list of token ids or null")
    return ids


def _ids_of(folder: Path, names: set[str]) -> set[int]:
    path = folder / "tokenizer.json"
    if not path.exists():
        return {token["id"] for token in added_tokens(folder) if token["content"] in names}
    if not names:
        return set()
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
    except msgspec.DecodeError:
        return set()  # the tokenizer's own reader says what is wrong
    added = {token.id for token in file.added_tokens if token.content in names}
    return added or {file.model.vocab[name] for name in names if isinstance(file.model.vocab, dict) and name in file.model.vocab}


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = {}


class _TokenizerFile(msgspec.Struct):
    """What is needed of tokenizer.json; the rest is passed over unread."""

    added_tokens: list[_AddedToken] = []
    model: _Model = msgspec.field(default_factory=_Model)


def _content(token: Any) -> Any:
    """Of a token that is a text, an object with `content`, or null."""
    return token.get("content") if isinstance(token, Mapping) else token


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    return value if isinstance(value, Mapping) else {}
