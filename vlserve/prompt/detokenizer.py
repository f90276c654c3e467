"""Tokens to text as they come, for any sequence of ids and every kind of tokenizer.

`tokenizers` decodes whole sequences, and what a token says can depend on its neighbours: bytes that make a character together, a
blank that is dropped at the beginning. Here a text is cut only where nothing that follows can change what stands before.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from vlserve.prompt.byte_level import bytes_of_token

ANCHOR = "a"  # stands for the text before: all decoders show it as it is
# these look at one token at a time, and at whether there is one before or behind it
_LOCAL = {"Metaspace", "WordPiece", "BPEDecoder", "Replace", "Strip", "ByteFallback", "Fuse"}
_BYTE = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")  # as Rust reads a number


class TokenDecoder:
    """A tokenizer's decoder, and where its text may be cut. `description` is tokenizer.json."""

    def __init__(self, tokenizer: HFTokenizer, description: Mapping[str, Any]) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        steps = _steps(description.get("decoder"))
        kinds = [step["type"] for step in steps]
        self._special = {token["id"] for token in description.get("added_tokens", ()) if token["special"]}
        self.is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_fallback = "ByteFallback" in kinds
        self._is_local = set(kinds) <= _LOCAL and _is_whole_after_fuse(steps) and self.text([ANCHOR]) == ANCHOR

    def token(self, id: int, *, skip_special_tokens: bool) -> str | None:
        """The vocabulary's token as it is written there, None where `id` is no token or a special one that is left out."""
        if skip_special_tokens and id in self._special:
            return None
        token: str | None = self._tokenizer.id_to_token(id)
        return token

    def text(self, tokens: Sequence[str]) -> str:
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(list(tokens)))

    def bytes_of(self, id: int) -> bytes:
        """What one token adds to a text, special or not; half a character too."""
        token = self.token(id, skip_special_tokens=False)
        if token is None:
            return b""
        if self.is_byte_level:
            return bytes_of_token(token)
        if self._has_byte_fallback and (byte := _byte(token)) is not None:
            return bytes([byte])
        return self.text([ANCHOR, token])[len(ANCHOR) :].encode() if self._is_local else self.text([token]).encode()

    def may_cut_behind(self, token: str) -> bool:
        """A run of bytes counts as one: a wrong byte spoils all characters of its run."""
        return self._is_local and not (self._has_byte_fallback and _byte(token) is not None)


class Detokenizer:
    """Text of one answer as it grows. All pieces together equal decoding all ids at once."""

    def __init__(self, decoder: TokenDecoder, *, skip_special_tokens: bool) -> None:
        self._decoder, self._skip = decoder, skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[str] = []  # at the beginning all tokens, then the anchor and those of the piece before
        self._context_text = ""
        self._waiting: list[str] = []

    def add(self, id: int) -> str:
        """The text that token `id` completes, often one word, sometimes nothing yet."""
        token = self._decoder.token(id, skip_special_tokens=self._skip)
        if token is None:
            return ""
        if self._decoder.is_byte_level:
            return self._characters.decode(bytes_of_token(token))
        self._waiting.append(token)
        return self._take() if self._decoder.may_cut_behind(token) else ""

    def finish(self) -> str:
        """What is left: half a character at the very end comes out as a replacement sign."""
        return self._take() if self._waiting else self._characters.decode(b"", final=True)

    def _take(self) -> str:
        tokens = [*self._context, *self._waiting]
        text = self._decoder.text(tokens)
        piece = text[len(self._context_text) :]
        if text:
            tokens = [ANCHOR, *self._waiting]
            text = self._decoder.text(tokens)
        self._context, self._context_text, self._waiting = tokens, text, []
        return piece


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The decoders one after another, sequences within sequences unfolded."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _is_whole_after_fuse(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what comes after `Fuse`, which makes one token of all, only looks at the text's beginning."""
    kinds = [step["type"] for step in steps]
    behind = steps[kinds.index("Fuse") :] if "Fuse" in kinds else ()
    return all(step["type"] == "Fuse" or (step["type"] == "Strip" and not step["stop"]) for step in behind)


def _byte(token: str) -> int | None:
    """The byte of a token such as <0xE4>."""
    match = _BYTE.fullmatch(token)
    return int(match[1], 16) if match else None
