"""Input items of the Responses API: as chat messages, and in the form in which they are kept and listed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlserve.errors import RequestError
from vlserve.prompt.chat_messages import DETAILS
from vlserve.server import protocol

Item = Mapping[str, Any]
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
CALLS, OUTPUTS = ("function_call", "custom_tool_call"), ("function_call_output", "custom_tool_call_output")
PREFIXES = {"message": "msg_", "reasoning": "rs_"}  # of ids; calls and their outputs have fc_


class Conversation:
    """The chat messages that items come to.

    Attributes:
        messages: as the chat route takes them.
        places: the fields of this API by those of the chat route, for errors.
    """

    def __init__(self, items: Sequence[tuple[Item, str]], instructions: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: dict[str, str] = {}
        self._thought = ""  # of a reasoning item, for the assistant's message that follows
        if instructions:
            self._add({"role": "system", "content": instructions}, "instructions")
            self.places["messages[0].content"] = "instructions"
        for item, place in items:
            self._read(item, place)

    def _read(self, item: Item, place: str) -> None:
        if not isinstance(item, Mapping):
            raise RequestError(f"{place} must be an object", param=place)
        kind = item.get("type") or "message"
        if kind == "message":
            self._message(item, place)
        elif kind in CALLS:
            self._call(item, place)
        elif kind in OUTPUTS:
            self._output(item, place)
        elif kind == "reasoning":
            parts = item.get("content") if isinstance(item.get("content"), Sequence) else ()
            self._thought += "".join(str(part.get("text") or "") for part in parts or () if isinstance(part, Mapping))
        else:
            raise RequestError(
                f"{place}.type is {str(kind)[:64]!r}; that is not supported: leave it out, or send what it says as a message",
                param=f"{place}.type",
            )

    def _message(self, item: Item, place: str) -> None:
        role, content = item.get("role"), item.get("content")
        before = f"messages[{len(self.messages)}].content"
        if place == "input":
            self.places[before] = place
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = self._parts(content, f"{place}.content", before)
            if role == "assistant" and all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
        message = {"role": role, "content": content}
        if role == "assistant":
            message |= self._thoughts()
        self._add(message, place)

    def _call(self, item: Item, place: str) -> None:
        arguments = item.get("arguments")
        if item.get("type") == "custom_tool_call":
            arguments = json.dumps({"input": item.get("input")}, ensure_ascii=False)
        call: dict[str, Any] = {"type": "function", "function": {"name": item.get("name"), "arguments": arguments}}
        if item.get("call_id") is not None:
            call["id"] = item["call_id"]
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or self._thought:
            last = {"role": "assistant", "content": None} | self._thoughts()
            self._add(last, place)
        calls = last.setdefault("tool_calls", [])
        here = f"messages[{len(self.messages) - 1}].tool_calls"
        self.places.setdefault(here, place)
        own = f"{here}[{len(calls)}]"
        self.places |= {own: place, f"{own}.function": place, f"{own}.id": f"{place}.call_id"}
        calls.append(call)

    def _output(self, item: Item, place: str) -> None:
        here = f"messages[{len(self.messages)}]"
        output = item.get("output")
        if isinstance(output, Sequence) and not isinstance(output, str):
            output = self._parts(output, f"{place}.output", f"{here}.content") or ""
        if not isinstance(output, (str, list)):
            raise RequestError(f"{place}.output must be a text or a list of parts", param=f"{place}.output")
        self.places |= {f"{here}.content": f"{place}.output", f"{here}.tool_call_id": f"{place}.call_id"}
        message = {"role": "tool", "content": output}
        self._add(message | ({"tool_call_id": item["call_id"]} if item.get("call_id") is not None else {}), place)

    def _parts(self, parts: Sequence[Any], place: str, before: str) -> list[dict[str, Any]]:
        """Parts of a message as the chat route has them; keys that say nothing to a model are left behind."""
        return [self._part(part, f"{place}[{i}]", f"{before}[{i}]") for i, part in enumerate(parts)]

    def _part(self, part: Any, place: str, before: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXTS:
            return {"type": "text", "text": _text(part.get("text"), f"{place}.text")}
        if kind == "refusal":
            return {"type": "text", "text": _text(part.get("refusal"), f"{place}.refusal")}
        if kind in ("input_image", "image_url"):
            self._refuse_file_id(part, place)
            return {"type": "image_url", "image_url": _image(part, place)}
        if kind == "input_file":
            self._refuse_file_id(part, place)
            name = "file_url" if part.get("file_data") is None else "file_data"
            url = part.get(name)
            if not isinstance(url, str) or (name == "file_data" and not url[:11].lower().startswith("data:image/")):
                raise RequestError(
                    f"{place}.type is 'input_file'; of files only pictures can be read. Send a document's pages as input_image, "
                    "or its text as input_text",
                    param=f"{place}.type",
                )
            self.places[f"{before}.image_url"] = f"{place}.{name}"
            return {"type": "image_url", "image_url": {"url": url}}
        shown = repr(kind)[:64] if isinstance(part, Mapping) else "missing"
        raise RequestError(
            f"{place}.type is {shown}; expected input_text, input_image, output_text or refusal", param=f"{place}.type"
        )

    def _refuse_file_id(self, part: Item, place: str) -> None:
        if part.get("file_id") is not None and not (part.get("image_url") or part.get("file_data") or part.get("file_url")):
            raise RequestError(
                f"{place}.file_id: files are not kept here; send image_url with the picture's URL or data URL",
                param=f"{place}.file_id",
            )

    def _thoughts(self) -> dict[str, Any]:
        thought, self._thought = self._thought, ""
        return {"reasoning_content": thought} if thought else {}

    def _add(self, message: dict[str, Any], place: str) -> None:
        self.places[f"messages[{len(self.messages)}]"] = place
        self.messages.append(message)


def kept_item(item: Item) -> dict[str, Any]:
    """An input item as it is listed: with type, id and status, and its content in parts."""
    kind = item.get("type") or "message"
    kept = {**item, "type": kind, "id": item.get("id") or protocol.new_id(PREFIXES.get(kind, "fc_"))}
    if kind != "reasoning":
        kept["status"] = item.get("status") or "completed"
    content = item.get("content")
    if kind == "message" and isinstance(content, str):
        said = item.get("role") == "assistant"
        kept["content"] = [
            {"type": "output_text", "text": content, "annotations": []} if said else {"type": "input_text", "text": content}
        ]
    return kept


def shortened(items: Sequence[tuple[Item, str]]) -> list[Callable[[], Sequence[tuple[Item, str]]]]:
    """The conversation, then without its oldest turns, one more each time; what the system says first stays.

    Each is made when it is asked for: all at once would take the square of their number.
    """
    roles = [item.get("role") if isinstance(item, Mapping) else None for item, _ in items]
    head = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(items))
    starts = [i for i, role in enumerate(roles) if role == "user" and i > head]
    return [lambda: items, *(lambda i=i: [*items[:head], *items[i:]] for i in starts)]


def _image(part: Item, place: str) -> dict[str, Any]:
    value = part.get("image_url")
    image = {**value} if isinstance(value, Mapping) else {"url": value}  # some clients write it as the chat route has it
    detail = part.get("detail") if image.get("detail") is None else image["detail"]
    if not isinstance(image.get("url"), str):
        raise RequestError(f"{place}.image_url must be the URL or data URL of a picture", param=f"{place}.image_url")
    if detail is not None and (not isinstance(detail, str) or detail not in DETAILS):
        raise RequestError(f"{place}.detail is {detail!r}; expected one of {', '.join(DETAILS)}", param=f"{place}.detail")
    return image if detail is None else image | {"detail": detail}


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{place} must be a text", param=place)
    return value
