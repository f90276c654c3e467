"""One answer's text as it grows: detokenised, cut at stop texts, and held back where a stop text may have begun.

A stop text that is one token of the vocabulary, such as <|im_end|>, is a stop token too: special tokens are not in the text.
Of an answer in Harmony the marks stay in the text for its parser, and stop texts count only in what a client sees of it.
"""

from __future__ import annotations

from dataclasses import replace

from vlserve.config import SamplingParams
from vlserve.prompt.harmony import CONSTRAIN, MARKS, MESSAGE, is_in_text
from vlserve.prompt.tokenizer import Tokenizer


def with_stop_tokens(sampling: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """`sampling` whose stop texts that are special or added tokens are stop tokens as well."""
    ids = {tokenizer.added[stop]["id"] for stop in sampling.stop if stop in tokenizer.added} - {*sampling.stop_token_ids}
    known = sorted(id for id in ids if id < vocab_size)
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *known)) if known else sampling


class AnswerText:
    """`add` gives the text that is certain so far; `finish` or `end` the rest. `stopped` once a stop text was met.

    `opened`: of an answer that is told apart by its channels, what it goes on from (`Prompt.opened`).
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, opened: str | None = None) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=sampling.skip_special_tokens)
        self._sampling = sampling
        self._names = {tokenizer.added[stop]["id"]: stop for stop in sampling.stop if stop in tokenizer.added}
        self._unseen = tokenizer.special_tokens_in(sampling.stop) if sampling.skip_special_tokens else {}
        self._held = ""
        self._hidden: list[range] = []  # places in `_held` of special tokens that are left out, since a stop text names them
        marks = () if opened is None else MARKS
        self._marks = {tokenizer.added[mark]["id"]: mark for mark in marks if mark in tokenizer.added}
        self._is_seen = opened is None or is_in_text(opened)  # by the client: no header
        self._num_tokens = 0
        self.stopped = False

    def add(self, token_id: int) -> str:
        self._num_tokens += 1
        if token_id in self._marks:
            return self._part(self._marks[token_id])
        text = self._detokenizer.add(token_id)
        name = self._unseen.get(token_id)
        if name is None or not self._is_seen:
            return self._pass_on(text)
        self._hidden.append(range(len(self._held), len(self._held) + len(name)))
        return self._pass_on(name)

    def finish(self) -> str:
        text = self._pass_on(self._detokenizer.finish())
        return text if self.stopped else text + self._let_go(len(self._held))

    def end(self, token_id: int) -> str:
        """The rest of an answer that a token ended, and with `include_stop_str_in_output` that token's text."""
        if not self._sampling.include_stop_str_in_output:
            return self.finish()
        if token_id not in self._names:
            text = self.add(token_id)
            return text if self.stopped else text + self.finish()
        text = self.finish()
        return text if self.stopped else text + self._names[token_id]

    def _part(self, mark: str) -> str:
        """No stop text reaches beyond a mark."""
        text = self.finish()
        if self.stopped:
            return text
        if mark != CONSTRAIN:
            self._is_seen = mark == MESSAGE
        return text + mark

    def _pass_on(self, text: str) -> str:
        stops = self._sampling.stop
        if not stops or not self._is_seen:
            return text
        self._held += text
        if self._num_tokens >= self._sampling.min_tokens:
            found = [(place, stop) for stop in stops if (place := self._held.find(stop)) >= 0]
            if found:
                place, stop = min(found)
                self.stopped = True
                return self._let_go(place) + (stop if self._sampling.include_stop_str_in_output else "")
        return self._let_go(len(self._held) - max(_overlap(self._held, stop) for stop in stops))

    def _let_go(self, length: int) -> str:
        """The first `length` characters of what is held, without special tokens that are left out."""
        text, self._held = self._held[:length], self._held[length:]
        hidden = {i for places in self._hidden for i in places}
        self._hidden = [range(r.start - length, r.stop - length) for r in self._hidden if r.stop > length]
        return "".join(character for i, character in enumerate(text) if i not in hidden) if hidden else text


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
