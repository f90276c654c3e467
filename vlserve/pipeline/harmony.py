"""An answer in Harmony (prompt/harmony.py) told apart while it comes, by its channels: reasoning, content and function calls.

None of the format is left in the text. `analysis` is reasoning; a message `to=functions.NAME` is a call, whose text is the
arguments; all else is content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from vlserve.pipeline.outputs import Piece
from vlserve.prompt.harmony import CHANNEL, CONSTRAIN, ENDS, MARK, MARKS, MESSAGE, START

THINK, END_THINK = "<think>", "</think>"
NAMESPACE = "functions."
LONGEST = max(map(len, MARKS))
_ROLES = ("assistant", "user", "system", "developer", "tool")
_NO_FUNCTIONS = (*_ROLES, "all", "functions", NAMESPACE)  # as recipients
_ROLE = re.compile(rf"\s*(?:{'|'.join(_ROLES)})(?=\s|<|$)")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*(\w*)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
# what a header has behind its role
_WORDS = re.compile(rf"(?:\s*(?:to=[^\s<]*|{re.escape(CHANNEL)}\s*(?:commentary\s+json\b|\w*)|{re.escape(CONSTRAIN)}\s*\w*))*\s*")
_BETWEEN = {"reasoning": "\n", "content": "\n"}  # two messages of a kind


class Inner(Protocol):
    """What reads the final channel's text once more."""

    def add(self, text: str) -> list[Piece]: ...

    def finish(self, *, cut: bool = False) -> list[Piece]: ...


class HarmonyParser:
    """`add` text as it comes, with its special tokens, and `finish` at the end; each gives the pieces that are certain.

    Args:
        opened: what the prompt has behind its last `<|start|>`. calls: look for function calls, whose texts are content
            otherwise. reasoning: give it as such; otherwise it is content between <think> and </think>, as other models write it.
        inner: reads what is content once more, as of an answer that a grammar holds to calls of another form.
    """

    def __init__(self, opened: str, *, calls: bool, reasoning: bool = True, inner: Inner | None = None) -> None:
        self._calls, self._inner, self._tags = calls, inner, not reasoning
        self._is_tagged = False  # within <think>
        self._text, self._header = "", ""
        self._is_header = True
        self._may_have_role = True  # in the header; the prompt may have it already
        self._kind: Literal["reasoning", "content", "call"] = "content"
        self._num_calls = 0
        self._last: str | None = None  # kind of the last piece
        self._is_new, self._is_empty = True, True  # message; nothing of it came
        for _ in self._read(opened, is_prompt=True):
            pass
        if self._is_header and self._header:
            self._header, self._may_have_role = self._without_role(), False
        self._last, self._is_new = None, False

    @property
    def is_reasoning(self) -> bool:
        return not self._is_header and self._kind == "reasoning"

    def add(self, text: str) -> list[Piece]:
        return self._kept(self._read(text))

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """What is left. A call whose name is known comes as far as it was written; a header that was cut is no content."""
        pieces = self._kept(self._rest(cut))
        return pieces + (self._inner.finish(cut=cut) if self._inner else [])

    def _kept(self, pieces: Iterable[Piece]) -> list[Piece]:
        kept = [piece for piece in pieces if piece.text or piece.name is not None]
        if self._tags:
            kept = [one for piece in kept for one in self._tagged(piece)]
        if self._inner is None:
            return kept
        return [one for piece in kept for one in (self._inner.add(piece.text) if piece.kind == "content" else [piece])]

    def _tagged(self, piece: Piece) -> Iterator[Piece]:
        is_thought = piece.kind == "reasoning"
        if is_thought != self._is_tagged:
            yield Piece("content", THINK if is_thought else END_THINK)
            self._is_tagged = is_thought
        yield Piece("content", piece.text) if is_thought else piece

    def _read(self, text: str, *, is_prompt: bool = False) -> Iterator[Piece]:
        self._text += text
        while match := MARK.search(self._text):
            before, self._text = self._text[: match.start()], self._text[match.end() :]
            yield from self._say(before)
            yield from self._mark(match[0])
        if is_prompt:
            length = len(self._text)
        else:  # a mark may have begun
            tail = range(max(0, len(self._text) - LONGEST), len(self._text))
            length = next((i for i in tail if _begins_mark(self._text[i:])), len(self._text))
        before, self._text = self._text[:length], self._text[length:]
        yield from self._say(before)

    def _rest(self, cut: bool) -> Iterator[Piece]:
        text, self._text = self._text, ""
        yield from self._say(text)
        if self._is_header and not (cut and self._is_begun()):
            yield from self._unopened()

    def _is_begun(self) -> bool:
        """Whether what stands here is a header as far as it goes."""
        may_be_role = self._may_have_role and any(role.startswith(self._header.lstrip()) for role in _ROLES)
        return may_be_role or CHANNEL in self._header or _RECIPIENT.search(self._header) is not None

    def _unopened(self) -> Iterator[Piece]:
        """The text of a message whose header no `<|message|>` ended: what is no word of a header."""
        header, self._header = self._without_role(), ""
        channel, words = _CHANNEL.search(header), _WORDS.match(header)
        text = header[words.end() :] if words else header
        if text.strip():
            self._open("reasoning" if channel is not None and channel[1] == "analysis" else "content")
            yield from self._say(header if channel is None else MARK.sub(" ", text))

    def _mark(self, mark: str) -> Iterator[Piece]:
        if mark == MESSAGE and self._is_header:
            yield from self._begin()
        elif mark in ENDS or mark == START or (mark == CHANNEL and not self._is_header):  # the end may have been left out
            yield from self._end(mark)
            self._header = CHANNEL if mark == CHANNEL else ""
        elif self._is_header:
            self._header += mark if mark == CHANNEL or CHANNEL in self._header else " "

    def _say(self, text: str) -> Iterator[Piece]:
        if not text:
            return
        if self._is_header:
            self._header += text
            if CHANNEL in self._header or not self._is_plain():
                return
            text, self._header = self._without_role(), ""  # a message without a header
            self._open("content")
        if self._kind == "call":
            yield Piece("call", text, self._num_calls - 1)
        else:
            between = _BETWEEN[self._kind] if self._is_new and self._last == self._kind else ""
            yield Piece(self._kind, between + text)
        self._last, self._is_new, self._is_empty = self._kind, False, False

    def _begin(self) -> Iterator[Piece]:
        channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
        name = recipient[1] if recipient and recipient[1] not in _NO_FUNCTIONS else ""
        is_thought = channel is not None and channel[1] == "analysis"
        self._header = ""
        if self._calls and name and (name.startswith(NAMESPACE) or not is_thought):
            self._open("call")
            self._num_calls += 1
            self._last = "call"
            yield Piece("call", "", self._num_calls - 1, name.removeprefix(NAMESPACE))
        else:
            self._open("reasoning" if is_thought else "content")

    def _open(self, kind: Literal["reasoning", "content", "call"]) -> None:
        self._is_header, self._kind, self._is_new, self._is_empty = False, kind, True, True

    def _end(self, mark: str) -> Iterator[Piece]:
        if self._is_header:
            yield from self._unopened()
        elif self._kind == "call" and self._is_empty:
            yield Piece("call", "{}", self._num_calls - 1)
        self._is_header, self._may_have_role = True, True

    def _is_plain(self) -> bool:
        """Whether what stands where a header would be is none, nor the beginning of one: a role, a recipient."""
        if self._may_have_role and any(role.startswith(self._header.lstrip()) for role in _ROLES):
            return False
        behind = self._without_role().lstrip()
        return bool(behind) and not behind.startswith("to=") and not "to=".startswith(behind)

    def _without_role(self) -> str:
        role = _ROLE.match(self._header) if self._may_have_role else None
        return self._header[role.end() :] if role else self._header


def _begins_mark(text: str) -> bool:
    return any(mark.startswith(text) for mark in MARKS)
