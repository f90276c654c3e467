"""One response: from the engine's deltas to OpenAI's object and events, item by item (reasoning, a message, function calls)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlserve.config import SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.pipeline.outputs import Delta, Piece, Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server import protocol
from vlserve.server.chat import reply_parser
from vlserve.server.responses_request import ResponsesRequest

DONE = ("completed", "incomplete", "failed", "cancelled")


class ResponsesAnswer:
    """Grows with every delta; `whole` is the response as it is now.

    `calls`: function calls are looked for. `effort`: of reasoning, where the model has a dial for it.
    `keep` is called once with the finished response, before its last event goes out.
    """

    ends_with_done = False

    def __init__(
        self,
        asked: ResponsesRequest,
        calls: bool,
        effort: str | None,
        params: SamplingParams,
        prompt: Prompt,
        tokenizer: Tokenizer,
        model: str,
        keep: Callable[[dict[str, Any]], None] | None = None,
        only_calls: bool = False,
    ) -> None:
        self._asked, self._effort, self._params, self._tokenizer, self._model = asked, effort, params, tokenizer, model
        self._keep = keep
        self._parser = reply_parser(prompt, tokenizer, calls=calls, only_calls=only_calls)
        self.id, self._created = protocol.new_id("resp_"), protocol.now()
        self._completed: int | None = None
        self.status = "queued" if asked.background else "in_progress"
        self._error: dict[str, Any] | None = None
        self._items: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the item that is open
        self._number = 0
        self._reasoning_tokens = 0
        self._usage: Usage | None = None

    @property
    def is_done(self) -> bool:
        return self.status in DONE

    def whole(self) -> dict[str, Any]:
        asked, params = self._asked, self._params
        choice = asked.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self.status,
            "background": bool(asked.background),
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": _copy(self._items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": self._effort, "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": self._keep is not None,
            "temperature": params.temperature,
            "text": {"format": self._format(), "verbosity": "medium"},
            "tool_choice": (choice or "auto") if choice is None or isinstance(choice, str) else choice.model_dump(),
            "tools": [_shown_tool(tool) for tool in asked.functions],
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "truncation": asked.truncation or "disabled",
            "usage": self._shown_usage(),
            "user": asked.user,
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        yield self._event("response.created", response=self.whole())
        self.status = "in_progress"
        yield self._event("response.in_progress", response=self.whole())

    def closing(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def event(self, body: dict[str, Any]) -> bytes:
        return f"event: {body['type']}\n".encode() + protocol.event(body)

    def add(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        self._usage = delta.usage
        self._reasoning_tokens += len(delta.token_ids) * self._parser.is_reasoning
        pieces = self._parser.add(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish(cut=delta.finish_reason == "length")
        if self._asked.parallel_tool_calls is False:
            pieces = [piece for piece in pieces if piece.call == 0]
        logprobs = self._logprobs(delta.logprobs)
        for piece in pieces:
            yield from self._take(piece, logprobs)
            logprobs = []
        if delta.finish_reason is not None:
            status = "incomplete" if delta.finish_reason == "length" else "completed"
            yield from self._close(status)
            if not self._items:
                yield from self._take(Piece("content", ""), logprobs)
                yield from self._close("completed")
            yield self._end(status)

    def failure(self, message: str, code: str) -> dict[str, Any]:
        """The stream's last event when the engine failed. `code` is not among OpenAI's words, of which one fits."""
        self._error = {"code": "server_error", "message": message}
        return self._end("failed")

    def cancel(self) -> None:
        """It was asked to end: what is there so far is the response."""
        if not self.is_done:
            self._end("cancelled")

    def _end(self, status: str) -> dict[str, Any]:
        self.status = status
        if self._kind is not None:
            self._items[-1]["status"] = "incomplete"
        if status == "completed":
            self._completed = protocol.now()
        whole = self.whole()
        if self._keep is not None:
            self._keep(whole)
        return self._event(f"response.{status}", response=whole)

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
            item = {"type": "function_call", "id": protocol.new_id("fc_"), "call_id": protocol.new_id("call_")}
            item |= {"name": piece.name, "arguments": "", "status": "in_progress"}
        elif piece.kind == "reasoning":
            item = {"type": "reasoning", "id": protocol.new_id("rs_"), "summary": [], "content": [], "status": "in_progress"}
        else:
            item = {"type": "message", "id": protocol.new_id("msg_"), "role": "assistant", "content": [], "status": "in_progress"}
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
                logprobs = _copy(part["logprobs"])
                yield self._event("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=logprobs)
            yield self._event("response.content_part.done", **place, content_index=0, part=_copy(part))
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
        shown = protocol.logprobs_dict(entries, self._tokenizer)
        return shown["content"] if shown else []

    def _shown_usage(self) -> dict[str, Any] | None:
        usage = self._usage
        if usage is None or not self.is_done:
            return None
        cached = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0, "image_tokens": usage.image_tokens}
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": cached,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _format(self) -> dict[str, Any]:
        form = self._asked.text.format if self._asked.text else None
        return form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}


def _shown_tool(tool: Any) -> dict[str, Any]:
    """A function as it was given; these four are there always."""
    always = ("type", "name", "description", "parameters", "strict")
    return {key: value for key, value in tool.model_dump(by_alias=True).items() if value is not None or key in always}


def _copy(value: Any) -> Any:
    """As it is now: an item goes on changing after its event was made."""
    return json.loads(json.dumps(value))
