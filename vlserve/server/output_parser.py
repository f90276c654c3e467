"""An answer's text told apart while it comes: reasoning, content, and function calls as Hermes models write them.

A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from vlserve.pipeline.outputs import Piece

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
# the usual order, which lets arguments be passed on while they come
_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")')
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class ReplyParser:
    """`add` text as it comes, `finish` at the end; each gives the pieces that are certain.

    Args:
        calls: look for function calls. reasoning: look for <think>. thinking: the prompt already opened it.
        only_calls: the answer is held to calls, so that other text is the beginning of one or a line end.
    """

    def __init__(self, *, calls: bool, reasoning: bool = True, thinking: bool = False, only_calls: bool = False) -> None:
        self.num_calls = 0
        self._only_calls, self._cut = only_calls, False
        self._calls = calls
        self._state: Literal["start", "reasoning", "content", "head", "arguments", "tail"]
        self._state = "reasoning" if thinking else "start" if reasoning else "content"
        self._text = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self._strip = thinking  # white space at the beginning of a part belongs to the tags, not to the answer

    @property
    def is_reasoning(self) -> bool:
        return self._state == "reasoning"

    def add(self, text: str) -> list[Piece]:
        self._text += text
        return self._kept(self._read(last=False))

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """What is left. A call whose name is known comes as far as it was written; tags are never content.

        Args:
            cut: the answer was ended by its length, so that half a tag is one.
        """
        self._cut = cut or self._only_calls
        pieces = list(self._read(last=True))
        if self._text and self._state == "head":
            pieces += self._unfinished(self._text)
        elif self._text:
            pieces.append(Piece("reasoning" if self._state == "reasoning" else "content", self._text))
        self._text = ""
        return self._kept(pieces)

    def _kept(self, pieces: Iterable[Piece]) -> list[Piece]:
        kept = [piece for piece in pieces if piece.text or piece.name is not None]
        return [piece for piece in kept if piece.kind != "content"] if self._only_calls else kept

    def _unfinished(self, text: str) -> Iterator[Piece]:
        """A call that ended before its arguments began."""
        match = _NAME.match(text)
        if match:
            yield Piece("call", "", self.num_calls, json.loads(match[1], strict=False))
            self.num_calls += 1
        elif not self._cut:
            yield Piece("content", text)

    def _read(self, *, last: bool) -> Iterator[Piece]:
        progress = True
        while progress and self._text:
            before = (self._state, len(self._text))
            yield from getattr(self, "_" + self._state)(last)
            progress = (self._state, len(self._text)) != before

    def _start(self, last: bool) -> Iterator[Piece]:
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._state, self._text, self._strip = "reasoning", text[len(THINK) :], True
        elif last and self._half(THINK):
            self._text = ""
        elif last or (text and not THINK.startswith(text)):
            self._state = "content"
        yield from ()

    def _reasoning(self, last: bool) -> Iterator[Piece]:
        text, found = self._until(END_THINK, last)
        yield Piece("reasoning", text.rstrip("\n") if found else text)
        if found:
            self._state, self._strip = "content", True

    def _content(self, last: bool) -> Iterator[Piece]:
        self._drop_line_ends()
        if not self._calls:
            yield Piece("content", self._take(len(self._text)))
            return
        text, found = self._until(CALL, last)
        yield Piece("content", text.rstrip("\n") if found else text)
        if found:
            self._state = "head"

    def _head(self, last: bool) -> Iterator[Piece]:
        match = _HEAD.match(self._text)
        if match:
            self._text = self._text[match.end() :]
            self._state, self._depth = "arguments", 0
            yield Piece("call", "", self.num_calls, json.loads(match[1], strict=False))
            self.num_calls += 1
            return
        end = self._text.find(END_CALL)
        if end >= 0 or last:  # another order of keys, or not what it should be
            whole = self._text[: end if end >= 0 else len(self._text)]
            try:
                call = json.loads(whole)
                name, arguments = call["name"], call.get("arguments", {})
                assert isinstance(name, str)
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
                if end >= 0:
                    yield Piece("content", CALL + self._take(end + len(END_CALL)))
                    self._state = "content"
                return
            self._text = self._text[len(whole) :]
            yield Piece("call", json.dumps(arguments, ensure_ascii=False), self.num_calls, name)
            self.num_calls += 1
            self._state = "tail"

    def _arguments(self, last: bool) -> Iterator[Piece]:
        for i, character in enumerate(self._text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    yield Piece("call", self._take(i + 1), self.num_calls - 1)
                    self._state = "tail"
                    return
        yield Piece("call", self._take(len(self._text)), self.num_calls - 1)

    def _tail(self, last: bool) -> Iterator[Piece]:
        _, found = self._until(END_CALL, last)
        if found:
            self._state, self._strip = "content", True
        yield from ()

    def _until(self, tag: str, last: bool) -> tuple[str, bool]:
        """Take the text before `tag`, and the tag; without one, what cannot be its beginning."""
        self._drop_line_ends()
        before, found, after = self._text.partition(tag)
        if found:
            self._text = after
            return before, True
        if last:
            half = self._half(tag)
            text = self._take(len(self._text))
            return text[: len(text) - half], False
        keep = len(self._text.rstrip("\n"))  # line ends before a tag belong to the tag
        for length in range(min(len(tag) - 1, keep), 0, -1):
            if self._text[:keep].endswith(tag[:length]) and keep == len(self._text):
                keep -= length
                break
        keep = len(self._text[:keep].rstrip("\n"))
        return self._take(keep), False

    def _half(self, tag: str) -> int:
        """How many characters of a tag the text ends with, where that is no accident: the answer was cut."""
        least = 1 if self._only_calls else 2  # a lone < may well be one
        lengths = range(len(tag) - 1, least - 1, -1) if self._cut else ()
        return next((n for n in lengths if self._text.endswith(tag[:n])), 0)

    def _drop_line_ends(self) -> None:
        if self._strip:
            self._text = self._text.lstrip("\n")
            self._strip = not self._text

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken
