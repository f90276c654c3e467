"""POST /v1/responses: OpenAI's newer API, create and stream, on top of the chat request.

Nothing is stored: every request carries its whole conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from vlserve.engine.messages import TokenLogprob
from vlserve.errors import RequestError
from vlserve.pipeline.outputs import Delta, Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server import protocol
from vlserve.server.chat import ChatRequest, Function, FunctionName, is_thinking
from vlserve.server.output_parser import Piece, ReplyParser
from vlserve.server.protocol import AnswerBody, Strict

LOGPROBS = "message.output_text.logprobs"


class FlatTool(Function):
    """A function as this API writes it: without the inner object."""

    type: Literal["function"]


class FlatName(FunctionName):
    type: Literal["function"]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    effort: str | None = None


class ResponsesRequest(AnswerBody):
    input: str | list[Any] = Field(description="a text, or a list of messages and function calls with their outputs")
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatName | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None

    def to_chat(self) -> ChatRequest:
        """The same request for the chat route; raises RequestError naming this API's field."""
        messages, _ = self._messages()
        values: dict[str, Any] = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": True if self._wants_logprobs else None,
            "top_logprobs": self.top_logprobs,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        if self.top_logprobs is not None and not self._wants_logprobs:
            raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
        if self.tools:
            functions = [tool.model_dump(exclude={"type"}) for tool in self.tools]
            values["tools"] = [{"type": "function", "function": function} for function in functions]
        if isinstance(self.tool_choice, FlatName):
            values["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            values["tool_choice"] = self.tool_choice
        form = self.text.format if self.text else None
        if form is not None and form.type == "json_schema":
            if form.schema_ is None:
                raise RequestError("text.format.schema is missing", param="text.format.schema")
            values["response_format"] = {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}
        elif form is not None:
            values["response_format"] = {"type": form.type}
        return ChatRequest.model_validate(values)

    def failure_event(self, error: Mapping[str, Any]) -> bytes:
        fields = {key: value for key, value in error["error"].items() if key != "type"}
        return b"event: error\n" + protocol.event({"type": "error", "sequence_number": 0, **fields})

    def renamed(self, error: RequestError) -> RequestError:
        """An error of the chat route with this API's name for the field."""
        names = {
            "max_completion_tokens": "max_output_tokens",
            "max_tokens": "max_output_tokens",
            "response_format": "text.format",
            "messages": "input",
        }
        match = re.match(r"messages\[(\d+)\]", error.param or "")
        old = match[0] if match else error.param or ""
        if match:
            _, places = self._messages()
            new = places[int(match[1])]
        else:
            new = names.get(old, old)
        if not old or new == old:
            return error
        param = new + (error.param or "")[len(old) :]
        return RequestError(str(error).replace(old, new), param=param, code=error.code)

    @property
    def _wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def _messages(self) -> tuple[list[Any], list[str]]:
        """Chat messages, and the field that each was made of."""
        messages: list[Any] = []
        places: list[str] = []

        def add(message: Any, place: str) -> None:
            messages.append(message)
            places.append(place)

        if self.instructions:
            add({"role": "system", "content": self.instructions}, "instructions")
        if isinstance(self.input, str):
            add({"role": "user", "content": self.input}, "input")
            return messages, places
        for i, item in enumerate(self.input):
            place = f"input[{i}]"
            if not isinstance(item, Mapping):
                raise RequestError(f"{place} must be an object", param=place)
            kind = item.get("type", "message")
            if kind == "message":
                add(_message(item, place), place)
            elif kind == "function_call":
                call = {"id": item.get("call_id"), "type": "function"}
                call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
                last = messages[-1] if messages else None
                if isinstance(last, dict) and "tool_calls" in last:
                    last["tool_calls"].append(call)
                else:
                    add({"role": "assistant", "content": None, "tool_calls": [call]}, place)
            elif kind == "function_call_output":
                add({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}, place)
            elif kind != "reasoning":  # what a model thought before is not shown to it again
                raise RequestError(f"{place}.type is {str(kind)[:64]!r}; that is not supported", param=f"{place}.type")
        return messages, places


def _message(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message of this API as a chat message."""
    allowed = {"type", "role", "content", "id", "status", "phase"}
    for key, value in item.items():
        if key not in allowed and value not in (None, [], {}, ""):
            raise RequestError(f"{place}.{key} is not supported", param=f"{place}.{key}", code="unsupported_parameter")
    content = item.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = [
            {"type": "text", "text": part.get("text")}
            if isinstance(part, Mapping) and part.get("type") == "output_text"
            else part
            for part in content
        ]
        if item.get("role") == "assistant" and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
    return {"role": item.get("role"), "content": content}


class ResponsesAnswer:
    """One response, item by item: reasoning, a message, function calls."""

    ends_with_done = False

    def __init__(self, asked: ResponsesRequest, calls: bool, prompt: Prompt, tokenizer: Tokenizer, model: str) -> None:
        self._asked, self._tokenizer, self._model = asked, tokenizer, model
        self._parser = ReplyParser(calls=calls, thinking=is_thinking(prompt, tokenizer))
        self._id, self._created = protocol.new_id("resp"), protocol.now()
        self._items: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the item that is open
        self._number = 0
        self._reasoning_tokens = 0
        self._usage: Usage | None = None
        self._reason: str | None = None

    def whole(self) -> dict[str, Any]:
        asked, reason = self._asked, self._reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        tools = [tool.model_dump() for tool in asked.tools or ()]
        choice = asked.tool_choice.model_dump() if isinstance(asked.tool_choice, FlatName) else asked.tool_choice
        body: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": self._format()},
            "tool_choice": choice or "auto",
            "tools": tools,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        if self._usage is not None and reason is not None:
            usage = self._usage
            body["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        return body

    def opening(self) -> Iterator[dict[str, Any]]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.whole())

    def closing(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def event(self, body: dict[str, Any]) -> bytes:
        return f"event: {body['type']}\n".encode() + protocol.event(body)

    def add(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        self._usage = delta.usage
        self._reasoning_tokens += len(delta.token_ids) * self._parser.is_reasoning
        pieces = self._parser.add(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        if self._asked.parallel_tool_calls is False:
            pieces = [piece for piece in pieces if piece.call == 0]
        logprobs = self._logprobs(delta.logprobs)
        for piece in pieces:
            yield from self._take(piece, logprobs)
            logprobs = []
        if delta.finish_reason is not None:
            yield from self._close("incomplete" if delta.finish_reason == "length" else "completed")
            if not self._items:
                yield from self._take(Piece("content", ""), logprobs)
                yield from self._close("completed")
            self._reason = delta.finish_reason
            kind = "response.incomplete" if delta.finish_reason == "length" else "response.completed"
            yield self._event(kind, response=self.whole())

    def failure(self, message: str, code: str) -> dict[str, Any]:
        """The stream's last event when the engine failed."""
        body = self.whole() | {"status": "failed", "error": {"code": code, "message": message}}
        return self._event("response.failed", response=body)

    def _take(self, piece: Piece, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if piece.kind != self._kind or piece.name is not None:
            yield from self._close("completed")
            yield from self._open(piece)
        item, index = self._items[-1], len(self._items) - 1
        place = {"item_id": item["id"], "output_index": index}
        if piece.kind == "call":
            item["arguments"] += piece.text
            if piece.text:
                yield self._event("response.function_call_arguments.delta", **place, delta=piece.text)
            return
        part = item["content"][0]
        part["text"] += piece.text
        if piece.kind == "reasoning":
            yield self._event("response.reasoning_text.delta", **place, content_index=0, delta=piece.text)
            return
        part["logprobs"] += logprobs
        yield self._event("response.output_text.delta", **place, content_index=0, delta=piece.text, logprobs=logprobs)

    def _open(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._kind = piece.kind
        item: dict[str, Any]
        if piece.kind == "call":
            item = {"type": "function_call", "id": protocol.new_id("fc"), "call_id": protocol.new_id("call")}
            item |= {"name": piece.name, "arguments": "", "status": "in_progress"}
        elif piece.kind == "reasoning":
            item = {"type": "reasoning", "id": protocol.new_id("rs"), "summary": [], "content": [], "status": "in_progress"}
        else:
            item = {"type": "message", "id": protocol.new_id("msg"), "role": "assistant", "content": [], "status": "in_progress"}
        self._items.append(item)
        place = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", **place, item=_copy(item))
        if piece.kind == "call":
            return
        part = (
            {"type": "reasoning_text", "text": ""}
            if piece.kind == "reasoning"
            else {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        )
        item["content"].append(part)
        yield self._event("response.content_part.added", **place, item_id=item["id"], content_index=0, part=_copy(part))

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        kind, self._kind = self._kind, None
        if kind is None:
            return
        item = self._items[-1]
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        if kind == "call":
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", **place, arguments=arguments, name=item["name"])
        else:
            part = item["content"][0]
            if kind == "reasoning":
                yield self._event("response.reasoning_text.done", **place, content_index=0, text=part["text"])
            else:
                logprobs = part["logprobs"]
                yield self._event("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=logprobs)
            yield self._event("response.content_part.done", **place, content_index=0, part=_copy(part))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
        shown = protocol.logprobs_dict(entries, self._tokenizer)
        return shown["content"] if shown else []

    def _format(self) -> dict[str, Any]:
        form = self._asked.text.format if self._asked.text else None
        return form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """As it is now: an item goes on changing after its event was made."""
    copied: dict[str, Any] = json.loads(json.dumps(value))
    return copied
