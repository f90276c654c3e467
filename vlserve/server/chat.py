"""POST /v1/chat/completions: the request's fields, and answers as OpenAI writes them, whole or in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from vlserve.config import SamplingParams, StructuredOutput
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import ModelError, RequestError
from vlserve.pipeline.harmony import HarmonyParser
from vlserve.pipeline.outputs import Delta, Piece, Timing, Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.conversation import PromptOptions
from vlserve.prompt.harmony import MESSAGE, opened
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server import neutral, protocol
from vlserve.server.constraints import ConstrainedBody, after, as_format
from vlserve.server.logs import say_once
from vlserve.server.output_parser import CALL, END_CALL, END_THINK, THINK, ReplyParser
from vlserve.server.protocol import Chunks, Strict

MAX_TOOLS = 128
ForPrompt = Callable[[Sequence[SamplingParams], Prompt, Tokenizer], Sequence[SamplingParams]]
FOR_SERVERS = ("strict", "cache_control", "defer_loading")  # keys of a tool that are not for the model
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Function(Strict):
    """Further keys, such as `return` of transformers' `get_json_schema`, reach the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="arguments follow the schema; with tool_choice auto too")


class Tool(Strict):
    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["function"] = "function"
    function: Function

    def description(self) -> dict[str, Any]:
        """As the chat template sees it: without what is for the server."""
        return self.model_dump(exclude_none=True, exclude=dict.fromkeys(FOR_SERVERS, True) | {"function": set(FOR_SERVERS)})


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(ConstrainedBody):
    instead: ClassVar[Mapping[str, str]] = neutral.CHAT
    messages: list[Any] | str = Field(
        description="OpenAI's messages: role and content, a text or a list of text and image_url parts; a text alone is a user's"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, description="counts where the chat template reads it, or enable_thinking")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="counts where the chat template reads it")
    enable_thinking: bool | None = Field(None, description="LMDeploy's place for chat_template_kwargs.enable_thinking")
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = Field(None, description="false leaves <think> in the content")
    return_tokens_as_token_ids: bool | None = Field(None, description='tokens of log-probabilities as "token_id:123"')
    return_timing: bool | None = Field(None, description="seconds of each choice: preparing, waiting, encoding, in all")
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    mm_processor_kwargs: dict[str, Any] | None = Field(None, description="what the model's preprocessing takes for one request")

    @property
    def calls(self) -> bool:
        """Whether function calls are looked for."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Whether the answer is function calls and nothing else."""
        return bool(self.tools) and self.tool_choice not in (None, "none", "auto")

    def params(self, defaults: Mapping[str, Any]) -> list[SamplingParams]:
        """Each choice's parameters; raises RequestError naming the field."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        protocol.check_top_logprobs(self.top_logprobs)
        return self.sampling(
            defaults,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            structured=self._structured(),
        )

    def renamed(self, error: RequestError) -> RequestError:
        """A grammar's or a variable's error with the field that asked for it."""
        param = error.param or ""
        if param == "chat_template_kwargs.enable_thinking" and self.enable_thinking is not None:
            return protocol.rename(error, "enable_thinking")
        if self.tools and param.startswith("structured.structural_tag") and self._tool_form() is not None:
            return protocol.rename(error, "tools")
        return super().renamed(error)

    def prompt_options(self) -> PromptOptions:
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        variables = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        effort = self.reasoning_effort
        if effort is not None and effort not in EFFORTS:
            expected = ", ".join(EFFORTS)
            raise RequestError(f"reasoning_effort is {effort[:64]!r}; expected one of {expected}", param="reasoning_effort")
        wishes: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        if self.verbosity not in (None, "medium"):
            wishes["verbosity"] = self.verbosity
        return PromptOptions(
            tools=[tool.description() for tool in self.tools or ()] if self.calls else (),
            variables=variables,
            wishes=wishes,
            continue_final=bool(self.continue_final_message),
            add_generation_prompt=self.add_generation_prompt is not False,
            cache_salt=self.cache_salt or "",
            mm_processor_kwargs=self.mm_processor_kwargs or {},
            only_final=self._holds_all,
            is_raw=self.is_raw,
        )

    def for_prompt(self, params: Sequence[SamplingParams], prompt: Prompt, tokenizer: Tokenizer) -> list[SamplingParams]:
        """The parameters with room for reasoning before what the answer must look like."""
        if opened(prompt.token_ids, tokenizer) is not None:
            return self._for_harmony(params)
        if self.separate_reasoning is False:
            return list(params)
        thinking = is_thinking(prompt, tokenizer)
        if not thinking and not (self.must_call and knows_thinking(tokenizer)):  # it may not call without having thought
            return list(params)
        thought = {"type": "tag", "begin": "" if thinking else THINK, "content": {"type": "any_text"}, "end": END_THINK}
        formed = [p.structured and after(thought, p.structured, optional=not thinking) for p in params]
        return [replace(p, structured=form) for p, form in zip(params, formed, strict=True)]

    def _for_harmony(self, params: Sequence[SamplingParams]) -> list[SamplingParams]:
        """What holds for all of an answer holds in the final channel (`prompt_options`);
        calls that may come are in another one, where no grammar reaches."""
        if any(p.structured for p in params) and not self._holds_all:
            say_once("strict functions are held to their schemas with tool_choice required only: the model calls in a channel")
            return [replace(p, structured=None) for p in params]
        return list(params)

    @property
    def is_raw(self) -> bool:
        """Whether the answer is wanted as the model writes it."""
        return self.separate_reasoning is False and self.skip_special_tokens is False

    @property
    def _holds_all(self) -> bool:
        """Whether something holds for an answer as a whole."""
        return self.must_call or self.wanted() is not None

    def _structured(self) -> StructuredOutput | None:
        """What the answer must look like: calls that must come win, and a format holds for text beside calls that may."""
        wanted, calls = self.wanted(), self._tool_form()
        if calls is None or wanted is None:
            form = wanted[1] if wanted is not None else None
            return form if calls is None else StructuredOutput(structural_tag={"type": "structural_tag", "format": calls})
        place, form = wanted
        if self.must_call and not place.startswith("response_format"):
            field = place.partition(".")[0]
            message = f'{field} and tool_choice exclude each other; leave one out, or send tool_choice: "auto"'
            raise RequestError(message, param="tool_choice")
        either = calls if self.must_call else {"type": "or", "elements": [as_format(form), calls]}
        return StructuredOutput(structural_tag={"type": "structural_tag", "format": either})

    def _tool_form(self) -> dict[str, Any] | None:
        """What calls must look like: calls that must come, that come in place of a format, and of strict functions."""
        choice, tools = self.tool_choice, self.tools or []
        if not tools:
            if choice not in (None, "none", "auto"):
                raise RequestError("tool_choice needs tools", param="tool_choice")
            return None
        if len(tools) > MAX_TOOLS:
            raise RequestError(f"tools has {len(tools)} functions; the limit is {MAX_TOOLS}", param="tools")
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            if not tools:
                raise RequestError(f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")
        no_text = self.must_call or self.wanted() is not None
        if choice == "none" or not (no_text or any(tool.function.strict for tool in tools)):
            return None
        anything = {"type": "object"}
        tags = [
            {
                "type": "tag",
                "begin": f'{CALL}\n{{"name": {json.dumps(tool.function.name)}, "arguments": ',
                "content": {"type": "json_schema", "json_schema": schema},
                "end": f"}}\n{END_CALL}",
            }
            for tool in tools
            for schema in ((tool.function.parameters if self.must_call or tool.function.strict else None) or anything,)
        ]
        one = isinstance(choice, NamedTool) or self.parallel_tool_calls is False
        if no_text:
            shape = {"type": "tags_with_separator", "separator": "\n", "at_least_one": True}
        else:
            shape = {"type": "triggered_tags", "triggers": [CALL], "at_least_one": False}
        return {**shape, "tags": tags, "stop_after_first": one}


def reply_parser(
    prompt: Prompt, tokenizer: Tokenizer, *, calls: bool, only_calls: bool, separate: bool = True
) -> ReplyParser | HarmonyParser:
    """What tells an answer to this prompt apart; `separate`: its reasoning from the rest."""
    behind = prompt.opened
    if behind is None:
        thinking = separate and is_thinking(prompt, tokenizer)
        return ReplyParser(calls=calls, reasoning=separate, thinking=thinking, only_calls=only_calls)
    is_held = behind.endswith(MESSAGE)  # a grammar's calls are as Hermes models write them
    inner = ReplyParser(calls=calls, reasoning=False, only_calls=only_calls) if is_held else None
    return HarmonyParser(behind, calls=calls, reasoning=separate, inner=inner)


def is_thinking(prompt: Prompt, tokenizer: Tokenizer) -> bool:
    """Whether the prompt ends inside an opened <think>, as some chat templates leave it."""
    return tokenizer.decode(prompt.token_ids[-8:], skip_special_tokens=False).rstrip("\n").endswith(THINK)


def knows_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the model was taught to think: <think> is one of its tokens."""
    try:
        tokenizer.token_id(THINK)
    except ModelError:
        return False
    return True


def reasoning_fields(text: str) -> dict[str, str]:
    """Under both names that clients look for: DeepSeek's and the one that vLLM and OpenRouter took later."""
    return {"reasoning_content": text, "reasoning": text}


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    parser: ReplyParser | HarmonyParser
    usage: Usage
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    timing: Timing | None = None
    finish_reason: str | None = None

    def take(self, piece: Piece) -> dict[str, Any]:
        """Book a piece, and give it as a chunk's delta."""
        if piece.kind == "reasoning":
            self.reasoning += piece.text
            return reasoning_fields(piece.text)
        if piece.kind == "content":
            self.content += piece.text
            return {"content": piece.text}
        if piece.name is not None:
            function = {"name": piece.name, "arguments": piece.text}
            self.calls.append({"id": protocol.new_id("call_"), "type": "function", "function": dict(function)})
            return {"tool_calls": [{"index": piece.call} | self.calls[-1] | {"function": function}]}
        self.calls[piece.call]["function"]["arguments"] += piece.text
        return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}


class ChatAnswer(Chunks):
    """All choices of one request, from the engine's deltas to OpenAI's objects."""

    def __init__(self, asked: ChatRequest, prompt: Prompt, tokenizer: Tokenizer, model: str) -> None:
        self._asked, self._prompt, self._tokenizer, self._model = asked, prompt, tokenizer, model
        self._id, self._created = protocol.new_id("chatcmpl-"), protocol.now()
        separate = asked.separate_reasoning is not False
        how = {"calls": asked.calls, "only_calls": asked.must_call, "separate": separate}
        self._choices = [
            Choice(reply_parser(prompt, tokenizer, **how), protocol.first_usage(prompt)) for _ in range(asked.num_choices)
        ]

    def whole(self) -> dict[str, Any]:
        """The answer, once every choice has its finish_reason."""
        usage = self._usage()
        body = protocol.envelope(self._id, "chat.completion", self._model, self._created)
        body |= {"choices": [self._choice(i) for i in range(len(self._choices))], "usage": usage}
        return body | ({"prompt_token_ids": self._prompt.token_ids} if self._asked.return_token_ids else {})

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice."""
        for index in range(len(self._choices)):
            chunk = self._chunk(index, {"role": "assistant", "content": ""})
            yield chunk | ({"prompt_token_ids": self._prompt.token_ids} if self._asked.return_token_ids and not index else {})

    def add(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks that an engine's delta gives, none when its text is not certain yet."""
        choice = self._choices[index]
        choice.usage, choice.timing = delta.usage or choice.usage, delta.timing
        choice.reasoning_tokens += len(delta.token_ids) * choice.parser.is_reasoning
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        pieces = choice.parser.add(delta.text)
        if delta.finish_reason is not None:
            pieces += choice.parser.finish(cut=delta.finish_reason == "length")
        if self._asked.include_reasoning is False:
            pieces = [piece for piece in pieces if piece.kind != "reasoning"]
        if self._asked.parallel_tool_calls is False:
            pieces = [piece for piece in pieces if piece.call == 0]
        logprobs = protocol.logprobs_dict(delta.logprobs, self._tokenizer, as_ids=bool(self._asked.return_tokens_as_token_ids))
        extra: dict[str, Any] = {"token_ids": list(delta.token_ids)} if self._asked.return_token_ids else {}
        bodies = [choice.take(piece) for piece in pieces]
        if not bodies and (logprobs or extra):
            bodies = [{"content": ""}]
        for body in bodies:
            yield self._chunk(index, body, logprobs=logprobs, **extra)
            logprobs, extra = None, {key: [] for key in extra}
        if delta.finish_reason is not None:
            called = bool(choice.calls) and delta.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else delta.finish_reason
            yield self._chunk(index, {}, choice.finish_reason, **self._timing(choice))

    def closing(self) -> Iterator[dict[str, Any]]:
        """The usage chunk, when it was asked for."""
        if self._asked.options().include_usage:
            body = protocol.envelope(self._id, "chat.completion.chunk", self._model, self._created)
            yield body | {"choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return protocol.usage_dict([c.usage for c in self._choices], sum(c.reasoning_tokens for c in self._choices))

    def _choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.reasoning:
            message |= reasoning_fields(choice.reasoning)
        if choice.calls:
            message |= {"tool_calls": choice.calls, "content": choice.content or None}
        as_ids = bool(self._asked.return_tokens_as_token_ids)
        logprobs = protocol.logprobs_dict(choice.logprobs, self._tokenizer, as_ids=as_ids) if self._asked.logprobs else None
        body = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        body |= self._timing(choice)
        return body | ({"token_ids": choice.token_ids} if self._asked.return_token_ids else {})

    def _timing(self, choice: Choice) -> dict[str, Any]:
        shown = self._asked.return_timing and choice.timing is not None
        return {"timing": asdict(choice.timing)} if shown and choice.timing is not None else {}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None, **extra: Any
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason, **extra}
        body = protocol.envelope(self._id, "chat.completion.chunk", self._model, self._created) | {"choices": [choice]}
        own = self._choices[index]
        return body | protocol.chunk_usage(self._asked.options(), own.usage, own.reasoning_tokens)
