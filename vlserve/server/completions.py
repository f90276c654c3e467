"""POST /v1/completions: raw prompts without the chat template. Special tokens in a text prompt are ordinary text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from vlserve.config import SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import RequestError
from vlserve.pipeline.outputs import Delta, Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server import neutral, protocol
from vlserve.server.chat import ChatRequest
from vlserve.server.constraints import ConstrainedBody
from vlserve.server.protocol import MAX_CHOICES, Chunks

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionRequest(ConstrainedBody):
    instead: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(ChatRequest.model_fields, "send it to /v1/chat/completions"),
        **neutral.COMPLETIONS,
    }
    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="a text, token ids, or a list of either")
    echo: bool | None = None
    logprobs: int | Literal[False] | None = Field(None, description="0: of the chosen tokens only")
    best_of: int | None = None
    add_special_tokens: bool | None = Field(None, description="false leaves out the token that begins every text")
    return_tokens_as_token_ids: bool | None = Field(None, description='tokens of log-probabilities as "token_id:123"')

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)

    @property
    def num_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def wants_nothing(self) -> bool:
        """No token is asked for: the prompt is computed, and its first answer token is left out again."""
        return (self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens) == 0

    def renamed(self, error: RequestError) -> RequestError:
        if error.param == "messages":
            return RequestError(str(error), param="prompt", code=error.code)
        return super().renamed(error)

    def params(self, defaults: Mapping[str, Any]) -> list[SamplingParams]:
        """Parameters of each choice of a prompt; raises RequestError naming the field."""
        if self.best_of is not None and self.best_of != self.num_choices:
            raise RequestError(f"best_of is {self.best_of}; send n for several answers, and choose among them", param="best_of")
        if self.echo and self.num_logprobs is not None:
            message = "echo gives no log-probabilities of the prompt; leave out echo, or logprobs"
            raise RequestError(message, param="echo", code="unsupported_parameter")
        protocol.check_top_logprobs(self.num_logprobs, "logprobs")
        if not self.prompts or not all(self.prompts):
            raise RequestError("prompt is empty", param="prompt")
        if len(self.prompts) * self.num_choices > MAX_CHOICES:
            raise RequestError(f"prompt and n ask for more than {MAX_CHOICES} answers; send several requests", param="prompt")
        wanted = self.wanted()
        own: dict[str, Any] = {"logprobs": self.num_logprobs, "structured": wanted and wanted[1]}
        if self.wants_nothing:
            own["max_tokens"] = 1
        return self.sampling({"max_tokens": DEFAULT_MAX_TOKENS, **defaults}, **own)


@dataclass(slots=True)
class _Choice:
    prompt: Prompt
    usage: Usage
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionAnswer(Chunks):
    """All choices of all prompts of one request; choice i belongs to prompt i // n."""

    def __init__(self, asked: CompletionRequest, prompts: Sequence[Prompt], tokenizer: Tokenizer, model: str) -> None:
        self._asked, self._tokenizer, self._model = asked, tokenizer, model
        self._id, self._created = protocol.new_id("cmpl-"), protocol.now()
        self._choices = [
            _Choice(prompt, protocol.first_usage(prompt), tokenizer.decode(prompt.token_ids) if asked.echo else "")
            for prompt in prompts
            for _ in range(asked.num_choices)
        ]

    def whole(self) -> dict[str, Any]:
        choices = [
            self._body(i, c.text, c.logprobs, c.finish_reason, 0)
            | ({"token_ids": c.token_ids, "prompt_token_ids": c.prompt.token_ids} if self._asked.return_token_ids else {})
            for i, c in enumerate(self._choices)
        ]
        return self._envelope() | {"choices": choices, "usage": self._usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        for index, choice in enumerate(self._choices):
            if self._asked.echo:
                yield self._chunk(index, choice.text, (), 0)

    def add(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if self._asked.wants_nothing:
            usage = delta.usage and replace(delta.usage, completion_tokens=0)
            delta = replace(delta, text="", token_ids=(), logprobs=None, finish_reason="length", usage=usage)
        choice = self._choices[index]
        offset = len(choice.text)
        choice.usage, choice.finish_reason = delta.usage or choice.usage, delta.finish_reason
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        if delta.text or delta.logprobs or delta.finish_reason or self._asked.return_token_ids:
            chunk = self._chunk(index, delta.text, delta.logprobs or (), offset)
            if self._asked.return_token_ids:
                chunk["choices"][0]["token_ids"] = list(delta.token_ids)
            yield chunk

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._asked.options().include_usage:
            yield self._envelope() | {"choices": [], "usage": self._usage()}

    def _chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        choice = self._choices[index]
        body = self._envelope() | {"choices": [self._body(index, text, logprobs, choice.finish_reason, offset)]}
        return body | protocol.chunk_usage(self._asked.options(), choice.usage)

    def _body(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None, offset: int) -> dict[str, Any]:
        shown = self._logprobs(logprobs, offset) if self._asked.num_logprobs is not None else None
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """As this older API has them, in parallel lists."""
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        as_ids = bool(self._asked.return_tokens_as_token_ids)
        for entry in entries:
            text = self._tokenizer.decode([entry.token_id], skip_special_tokens=False)
            pairs = [*entry.top, (entry.token_id, entry.logprob)]  # the chosen token is there, likely or not
            *tops, own = [protocol.token_logprob(*pair, self._tokenizer, as_ids=as_ids) for pair in pairs]
            shown["tokens"].append(own["token"])
            shown["token_logprobs"].append(own["logprob"])
            shown["top_logprobs"].append({top["token"]: top["logprob"] for top in [*tops, own]})
            shown["text_offset"].append(offset)
            offset += len(text)
        return shown

    def _usage(self) -> dict[str, Any]:
        number = self._asked.num_choices
        groups = [self._choices[i : i + number] for i in range(0, len(self._choices), number)]
        return _sum([protocol.usage_dict([c.usage for c in group]) for group in groups])

    def _envelope(self) -> dict[str, Any]:
        return protocol.envelope(self._id, "text_completion", self._model, self._created)


def _sum(each: Sequence[Any]) -> Any:
    """Numbers added up, in dictionaries of the same keys too."""
    if not isinstance(each[0], dict):
        return sum(each)
    return {key: _sum([one[key] for one in each]) for key in each[0]}
