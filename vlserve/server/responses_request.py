"""The body of POST /v1/responses, and the chat request that it comes to. Its input items are responses_input.py's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from vlserve.errors import RequestError
from vlserve.server import neutral
from vlserve.server.chat import ChatRequest, Function, FunctionName
from vlserve.server.constraints import FIELDS, StructuredBody
from vlserve.server.logs import say_once
from vlserve.server.protocol import AnswerBody, SamplingBody, Strict, event
from vlserve.server.responses_input import Conversation, Item
from vlserve.server.validation import explain

LOGPROBS = "message.output_text.logprobs"
# kinds of tools that OpenAI runs, or whose calls have a form of their own
HOSTED = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "namespace",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
REFUSED = {  # fields with something else to send in their place
    "max_tokens": "here it is max_output_tokens",
    "max_completion_tokens": "here it is max_output_tokens",
    "return_token_ids": "token ids come from /v1/chat/completions",
    "conversation": "conversations are not kept; send the whole input, or with --store-responses previous_response_id",
    "prompt": "prompt templates are not kept; send instructions and input",
    "context_management": "input is never compacted; leave it out and send less input",
    "moderation": "there is no moderation model; leave it out",
}
NAMES = {  # of the chat route, and of this API; the longer ones first
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
}


class FlatTool(Function):
    """A function as this API writes it: without the inner object. What OpenAI's own tools would do with it says nothing here."""

    type: Literal["function"]
    defer_loading: bool | None = Field(None, description="no meaning: every function is shown to the model")
    allowed_callers: list[str] | None = Field(None, description="no meaning: only the model calls")
    output_schema: dict[str, Any] | None = Field(None, description="no meaning: the model is not shown it")
    async_: Literal[False] | None = Field(None, alias="async")

    @model_validator(mode="before")
    @classmethod
    def _refuse_chats_form(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("function"), Mapping):
            raise ValueError("name and parameters stand beside type in this API, not in an object function")
        return given


class HostedTool(Strict):
    """A tool of another kind, whatever it has."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str


def _kind(tool: Any) -> str:
    return "FlatTool" if isinstance(tool, Mapping) and tool.get("type") == "function" else "HostedTool"


AnyTool = Annotated[Annotated[FlatTool, Tag("FlatTool")] | Annotated[HostedTool, Tag("HostedTool")], Discriminator(_kind)]


class FlatName(FunctionName):
    type: Literal["function"]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["none", "auto", "required"] = "auto"
    tools: list[FlatName | HostedTool] = Field(min_length=1)


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="the model has no dial for it")


class Reasoning(Strict):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="summaries are not made")
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard"] | None = None


class ResponsesRequest(SamplingBody):
    instead: ClassVar[Mapping[str, str]] = {
        **{name: f"here it is structured_outputs.{kind}" for name, kind in FIELDS.items()},
        **neutral.RESPONSES,
    }
    input: str | list[Any] = Field(description="a text, or a list of messages and function calls with their outputs")
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[Includable] | None = None
    text: TextOptions | None = None
    structured_outputs: StructuredBody | None = None
    tools: list[AnyTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatName | AllowedTools | HostedTool | None = Field(
        None, union_mode="left_to_right"
    )
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(None, ge=1, description="of calls that the server runs; it runs none")
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    store: bool | None = Field(None, description="keep the response, which needs --store-responses; true where it is given")
    previous_response_id: str | None = Field(None, description="needs --store-responses")
    background: bool | None = Field(None, description="answer at once and be asked again; needs --store-responses")
    # without influence on the answer, as are user, metadata and others that every route takes
    client_metadata: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None
    # refused with a way out
    conversation: Any = Field(None, description="refused: " + REFUSED["conversation"])
    prompt: Any = Field(None, description="refused: " + REFUSED["prompt"])
    context_management: Any = Field(None, description="refused: " + REFUSED["context_management"])
    moderation: Any = Field(None, description="refused: " + REFUSED["moderation"])
    _items: Sequence[tuple[Item, str]] = PrivateAttr(())  # that `to_chat` was asked for, to name fields in errors
    _chat: ChatRequest | None = PrivateAttr(None)

    @property
    def functions(self) -> list[FlatTool]:
        """The tools that the model is shown."""
        tools = [tool for tool in self.tools or () if isinstance(tool, FlatTool)]
        if isinstance(self.tool_choice, AllowedTools):
            allowed = {name.name for name in self.tool_choice.tools if isinstance(name, FlatName)}
            return [tool for tool in tools if tool.name in allowed]
        return tools

    @property
    def effort(self) -> str | None:
        return self.reasoning.effort if self.reasoning else None

    @property
    def own_items(self) -> list[tuple[Any, str]]:
        """This request's input items, each with its place."""
        if isinstance(self.input, str):
            return [({"role": "user", "content": self.input}, "input")]
        return [(item, f"input[{i}]") for i, item in enumerate(self.input)]

    def check(self) -> None:
        """Raises RequestError for what cannot be had, with what to send instead."""
        for name, instead in REFUSED.items():
            if getattr(self, name, None) not in (None, [], False):
                raise RequestError(f"{name} is not supported; {instead}", param=name, code="unsupported_parameter")
        if self.num_choices != 1:
            raise RequestError(f"n is {self.n}; a response is one answer, so leave n out", param="n")
        self._check_tools()

    def to_chat(self, items: Sequence[tuple[Item, str]]) -> ChatRequest:
        """The same request for the chat route; raises RequestError naming this API's field.

        `items` are the whole conversation, each item with its place in this request.
        """
        self._items = items
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            say_once("text.verbosity changes nothing: the model has no dial for it")
        shared = {name: getattr(self, name) for name in ResponsesRequest.model_fields if name in ChatRequest.model_fields}
        values = {name: value for name, value in shared.items() if value is not None and name in SHARED}
        values |= {
            "messages": Conversation(items, self.instructions).messages,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": True if self.wants_logprobs else None,
            "reasoning_effort": self.effort,
            "tools": [_chat_tool(tool) for tool in self.functions] or None,
            "tool_choice": self._chat_choice(),
            "response_format": self._response_format(),
        }
        try:
            self._chat = ChatRequest.model_validate(values)
            return self._chat
        except ValidationError as error:
            raise explain(error) from None

    def failure_event(self, error: Mapping[str, Any]) -> bytes:
        fields = {key: value for key, value in error["error"].items() if key != "type"}
        return b"event: error\n" + event({"type": "error", "sequence_number": 0, **fields})

    def renamed(self, error: RequestError) -> RequestError:
        """An error of the chat route with this API's names; those found before there was a chat request have them already."""
        if self._chat is None:
            return error
        error = self._chat.renamed(error)
        text, param = str(error), error.param or ""
        places = {f"tools[{i}].function": f"tools[{self._place(tool)}]" for i, tool in enumerate(self.functions)}
        if self.effort:
            places |= {"reasoning_effort": "reasoning.effort", "chat_template_kwargs.reasoning_effort": "reasoning.effort"}
        places |= Conversation(self._items, self.instructions).places
        places |= NAMES | {"messages": "input"}
        old = max((place for place in places if _begins(param, place)), key=len, default="")
        new = places[old] + param[len(old) :] if old else param
        if old:
            text = re.sub(r"^messages\b", new, text) if param == "messages" else text.replace(param, new)
        for name, own in NAMES.items():
            text = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w])", own, text)
        return RequestError(text, param=new or None, code=error.code)

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def _place(self, tool: FlatTool) -> int:
        return next(i for i, other in enumerate(self.tools or ()) if other is tool)

    def _check_tools(self) -> None:
        """Only functions can be called. Others are left out where the client says that none must be."""
        choice = self.tool_choice
        if isinstance(choice, HostedTool):
            raise RequestError(
                f"tool_choice is of type {choice.type[:64]!r}; expected none, auto, required, "
                '{"type": "function", "name": ...} or {"type": "allowed_tools", "mode": ..., "tools": [...]}',
                param="tool_choice",
            )
        may_go = choice in ("auto", "none") or (isinstance(choice, AllowedTools) and choice.mode != "required")
        for i, tool in enumerate(self.tools or ()):
            if not isinstance(tool, HostedTool):
                continue
            if not may_go or tool.type not in HOSTED:
                way_out = ', or send tool_choice: "auto" to go on without it' if tool.type in HOSTED else ""
                raise RequestError(
                    f"tools[{i}].type is {tool.type[:64]!r}; only functions are supported. Leave it out{way_out}",
                    param=f"tools[{i}].type",
                    code="unsupported_parameter",
                )
            say_once(f"a tool of type {tool.type} was left out: only functions are supported")
        if isinstance(choice, AllowedTools) and choice.mode == "required" and not self.functions:
            raise RequestError("tool_choice.tools names no function of tools", param="tool_choice.tools")

    def _chat_choice(self) -> Any:
        choice = self.tool_choice
        if isinstance(choice, FlatName):
            return {"type": "function", "function": {"name": choice.name}}
        choice = choice.mode if isinstance(choice, AllowedTools) else choice
        return None if choice == "auto" and not self.functions else choice

    def _response_format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text else None
        if form is None:
            return None
        if form.type != "json_schema":
            return {"type": form.type}
        if form.schema_ is None:
            raise RequestError("text.format.schema is missing", param="text.format.schema")
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_, "strict": form.strict}}


# fields that mean the same on both routes
SHARED = {*SamplingBody.model_fields, "top_logprobs", "structured_outputs", "parallel_tool_calls"}
SHARED |= {"chat_template_kwargs", "mm_processor_kwargs"}
SHARED -= {*AnswerBody.model_fields, "stream_options", "n", *REFUSED}


def _chat_tool(tool: FlatTool) -> Mapping[str, Any]:
    return {"type": "function", "function": tool.model_dump(include=set(Function.model_fields), exclude_none=True)}


def _begins(param: str, place: str) -> bool:
    return param == place or param.startswith((place + ".", place + "["))
