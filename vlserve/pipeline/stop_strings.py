"""One answer's text as it grows: detokenised, cut at stop texts, and held back where a stop text may have begun."""

from __future__ import annotations

from vlserve.config import SamplingParams
from vlserve.prompt.tokenizer import Tokenizer


class AnswerText:
    """`add` gives the text that is certain so far; `finish` the rest. `stopped` once a stop text was met."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=sampling.skip_special_tokens)
        self._sampling = sampling
        self._held = ""
        self._num_tokens = 0
        self.stopped = False

    def add(self, token_id: int) -> str:
        self._num_tokens += 1
        return self._pass_on(self._detokenizer.add(token_id))

    def finish(self) -> str:
        text = self._pass_on(self._detokenizer.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _pass_on(self, text: str) -> str:
        stops = self._sampling.stop
        if not stops:
            return text
        self._held += text
        if self._num_tokens >= self._sampling.min_tokens:
            found = [(place, stop) for stop in stops if (place := self._held.find(stop)) >= 0]
            if found:
                place, stop = min(found)
                self.stopped = True
                end = place + (len(stop) if self._sampling.include_stop_str_in_output else 0)
                text, self._held = self._held[:end], ""
                return text
        keep = max(_overlap(self._held, stop) for stop in stops)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
