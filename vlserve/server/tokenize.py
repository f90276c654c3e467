"""POST /tokenize and /detokenize, as vLLM has them: how many tokens a text or a conversation is, without an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vlserve.errors import RequestError
from vlserve.prompt.conversation import PromptOptions
from vlserve.server.chat import Tool
from vlserve.server.protocol import Body

MAX_DETOKENIZE = 1_000_000


class TokenizeRequest(Body):
    instead: ClassVar[Mapping[str, str]] = dict.fromkeys(("content", "text", "input"), "here it is prompt")
    prompt: str | None = Field(None, description="a raw text; or messages")
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool | None = Field(None, description="also give token_strs, the tokens as the vocabulary writes them")

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give prompt or messages, one of them", param="prompt")

    def prompt_options(self) -> PromptOptions:
        return PromptOptions(
            tools=[tool.description() for tool in self.tools or ()],
            variables=self.chat_template_kwargs or {},
            continue_final=bool(self.continue_final_message),
            add_generation_prompt=self.add_generation_prompt is not False,
        )


class DetokenizeRequest(Body):
    instead: ClassVar[Mapping[str, str]] = dict.fromkeys(("token_ids", "ids", "input_ids"), "here it is tokens")
    tokens: list[int]

    def check(self, vocab_size: int) -> None:
        if len(self.tokens) > MAX_DETOKENIZE:
            raise RequestError(f"tokens has {len(self.tokens)} ids; the limit is {MAX_DETOKENIZE}", param="tokens")
        for i, id in enumerate(self.tokens):
            if not 0 <= id < vocab_size:
                raise RequestError(f"tokens[{i}] is {id}; the vocabulary has 0 to {vocab_size - 1}", param=f"tokens[{i}]")
