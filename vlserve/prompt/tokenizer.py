"""Text to tokens: the checkpoint's tokenizer.json, read without transformers. The way back is detokenizer.py's.

What a chat template wrote gets the ids that the tokenizer gives for the whole text. Text from outside never gives a special
token, whatever it says.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as HFTokenizer

from vlserve.errors import ModelError
from vlserve.models.tokenizer_files import read_description, read_settings
from vlserve.prompt.conversation import Text
from vlserve.prompt.detokenizer import Detokenizer, TokenDecoder


class Tokenizer:
    def __init__(self, folder: Path, control_tokens: Iterable[str] = ()) -> None:
        """Read `folder`'s tokenizer; `control_tokens` count as special even where the file says otherwise."""
        description, settings = read_description(folder), read_settings(folder)
        self.settings = settings
        control = set(control_tokens)
        for token in description.get("added_tokens", ()):
            token["special"] = token["special"] or token["content"] in control
        self.added = {token["content"]: token for token in description.get("added_tokens", ())}
        self._whole = HFTokenizer.from_str(json.dumps(description))
        self._decoder = TokenDecoder(self._whole, description)
        self._special = {token["id"]: token["content"] for token in self.added.values() if token["special"]}
        # looked for in the normalised text, which may have a blank where the token begins: transformers misses these too
        self._may_be_missed = {
            name
            for name, token in self.added.items()
            if token.get("normalized") and not token.get("single_word") and name not in control
        }
        self._unknown = _unknown_id(self._whole, description)
        # a token of ours in front of a text tells the tokenizer that it is not the beginning
        self._front = f"\ue000{secrets.token_hex(16)}\ue001"
        self._plain = HFTokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        self._plain.add_tokens([AddedToken(self._front, normalized=False)])
        self.num_tokens = self._whole.get_vocab_size()
        self.beginning = self._read_beginning()
        bos = self.added.get(token_text(settings.get("bos_token")) or "")
        self._openings = {*self.beginning[:1], *([bos["id"]] if bos else ())}

    def token_id(self, token: str) -> int:
        """The id of a token; raises ModelError when the vocabulary lacks it."""
        id = self._whole.token_to_id(token)
        if id is None:
            raise ModelError(f"tokenizer.json has no token {token!r}")
        return int(id)

    def encode_plain(self, text: str, *, at_beginning: bool = False) -> list[int]:
        """Tokens of text from outside: special tokens in it are ordinary characters.

        `at_beginning`: nothing stands before it; some tokenizers begin a text with a blank of their own.
        """
        front = "" if at_beginning else self._front
        encoding = _encode(self._plain, front + text)
        # Unigram has special tokens among its pieces: such a piece is cut behind its first character
        cuts = [start + 1 - len(front) for start, stop, _ in self._special_spans(encoding, front + text) if stop - start > 1]
        if not cuts:
            return encoding.ids[bool(front) :]
        bounds = [0, *cuts, len(text)]
        parts = [text[start:stop] for start, stop in pairwise(bounds)]
        return [id for i, part in enumerate(parts) for id in self.encode_plain(part, at_beginning=at_beginning and not i)]

    def encode_rendered(self, pieces: Sequence[Text | str]) -> list[int]:
        """Tokens of a rendered chat template: ordinary text as Text, special tokens as str.

        They are the ids of the whole text, as transformers has them. Where that would make special tokens of text from outside,
        each text is encoded by itself.
        """
        whole = self._encode_whole(pieces)
        return self._encode_apart(pieces) if whole is None else whole

    def _encode_whole(self, pieces: Sequence[Text | str]) -> list[int] | None:
        """None where special tokens are not just those that the template wrote, in their places."""
        text = "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)
        encoding = _encode(self._whole, text)
        spans = self._special_spans(encoding, text)[::-1]
        place = 0
        for piece in pieces:
            if isinstance(piece, str):
                start, stop, id = spans[-1] if spans else (0, 0, -1)
                if start <= place < stop and id == self.added[piece]["id"]:
                    spans.pop()
                elif piece not in self._may_be_missed:
                    return None
            place += len(piece if isinstance(piece, str) else piece.text)
        return None if spans else encoding.ids

    def _encode_apart(self, pieces: Sequence[Text | str]) -> list[int]:
        ids: list[int] = []
        pending = ""  # ordinary text, of the template and of messages, up to the next special token
        at_beginning, strip = True, False
        for piece in pieces:
            if isinstance(piece, Text):
                pending += piece.text.lstrip() if strip and not pending else piece.text
                continue
            added = self.added[piece]
            text = pending.rstrip() if added.get("lstrip") else pending
            ids += [*self.encode_plain(text, at_beginning=at_beginning), added["id"]]
            pending, at_beginning, strip = "", False, bool(added.get("rstrip"))
        return ids + self.encode_plain(pending, at_beginning=at_beginning)

    def _special_spans(self, encoding: Encoding, text: str) -> list[tuple[int, int, int]]:
        """Start, stop and id of each special token in `text`; the unknown token of an unknown word is none."""
        spans = []
        for i, id in enumerate(encoding.ids):
            if id in self._special:
                start, stop = encoding.token_to_chars(i) or (0, 0)
                if id != self._unknown or text[start:stop].strip() == self._special[id]:
                    spans.append((start, stop, id))
        return spans

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        """The special tokens that are named somewhere in `texts`, by id."""
        together = "\0".join(texts)
        return {id: name for id, name in self._special.items() if name in together} if together else {}

    def has_beginning(self, ids: Sequence[int]) -> bool:
        """Whether a text begins with the BOS token, so that the tokenizer's own has no place in front of it."""
        return bool(ids) and ids[0] in self._openings

    def _read_beginning(self) -> list[int]:
        """Tokens that the tokenizer puts in front of any text (BOS, or nothing). What it puts behind has no place here."""
        encoding = self._whole.encode("a", add_special_tokens=True)
        added = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return [id for id, _ in added]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._whole.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self._decoder, skip_special_tokens=skip_special_tokens)

    def bytes_of(self, id: int) -> bytes:
        """What one token adds to a text, special or not, in UTF-8; it may be half a character."""
        return self._decoder.bytes_of(id)

    def raw_token(self, id: int) -> str:
        """The token as the vocabulary writes it, e.g. Ġis; empty where there is none."""
        return self._decoder.token(id, skip_special_tokens=False) or ""


def _encode(tokenizer: HFTokenizer, text: str) -> Encoding:
    # encode() would hold the interpreter lock throughout, encode_batch() releases it
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]


def _unknown_id(tokenizer: HFTokenizer, description: dict[str, Any]) -> int | None:
    """The token that stands for words that the vocabulary lacks."""
    model = description["model"]
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if isinstance(token, str) else model.get("unk_id")


def token_text(token: Any) -> str | None:
    """A token as tokenizer_config.json has it: a text, an object with `content`, or null."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
