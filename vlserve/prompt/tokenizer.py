"""Text to tokens and back: the checkpoint's tokenizer.json, read without transformers.

`encode_plain` never gives a control token, whatever the text says; `Detokenizer` turns a stream of
tokens into text that never ends in half a character.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers.decoders import DecodeStream

from vlserve.errors import ModelError


class Tokenizer:
    def __init__(self, folder: Path, control_tokens: Iterable[str] = ()) -> None:
        """Read `folder`'s tokenizer; `control_tokens` count as special even where the file says otherwise."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(
                f"{folder}: checkpoint file missing: tokenizer.json. Save the tokenizer with transformers to make one"
            )
        try:
            description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path}: not valid JSON: {error}") from error
        settings = _read_settings(folder)
        self.settings = settings
        control = set(control_tokens)
        for token in description.get("added_tokens", ()):
            token["special"] = token["special"] or token["content"] in control
        self.added = {token["content"]: token for token in description.get("added_tokens", ())}
        self._whole = HFTokenizer.from_str(json.dumps(description))
        self._plain = HFTokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        self.num_tokens = self._whole.get_vocab_size()

    def token_id(self, token: str) -> int:
        """The id of a token; raises ModelError when the vocabulary lacks it."""
        id = self._whole.token_to_id(token)
        if id is None:
            raise ModelError(f"tokenizer.json has no token {token!r}")
        return int(id)

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of text from outside: special tokens in it are ordinary characters."""
        # encode() would hold the interpreter lock throughout, encode_batch() releases it
        return list(self._plain.encode_batch([text], add_special_tokens=False)[0].ids)

    @property
    def beginning(self) -> list[int]:
        """Tokens that the tokenizer puts in front of any text (a BOS token, or nothing)."""
        ids = self._whole.encode("", add_special_tokens=True).ids
        return list(ids[:1])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._whole.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self._whole, skip_special_tokens)


class Detokenizer:
    """Text of one answer as it grows. All pieces together equal decoding all ids at once."""

    def __init__(self, tokenizer: HFTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._text = ""

    def add(self, id: int) -> str:
        """The text that token `id` completes, often one word, sometimes nothing yet."""
        self._ids.append(id)
        piece = self._stream.step(self._tokenizer, id) or ""
        self._text += piece
        return piece

    def finish(self) -> str:
        """What is left: half a character at the very end comes out as a replacement sign."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        rest = whole[len(self._text) :] if whole.startswith(self._text) else ""
        self._text += rest
        return rest


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
