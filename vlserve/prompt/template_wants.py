"""What some chat templates want of messages, told by their source: they say it in comments, or fail.

GPT-OSS's takes reasoning as `thinking`, one call a message, and a description of every function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlserve.errors import RequestError
from vlserve.prompt.conversation import Message, Text

_THINKING = re.compile(r"""\.thinking\b|['"]thinking['"]""")
_ALL_CALLS = re.compile(r"""\bin\s+\w+(\.tool_calls|\[['"]tool_calls['"]\])""")
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}  # of three that GPT-OSS knows


@dataclass(frozen=True, slots=True)
class Wants:
    """thinking: reasoning under that name, in the place of the text beside calls. one_call: not several in a message."""

    thinking: bool
    one_call: bool
    channels: bool  # of Harmony

    @classmethod
    def of(cls, source: str) -> Wants:
        return cls(
            thinking=_THINKING.search(source) is not None,
            one_call="tool_calls[0]" in source and _ALL_CALLS.search(source) is None,
            channels="<|channel|>" in source,
        )

    def messages(self, given: Sequence[Message]) -> list[Message]:
        if self.one_call and self.channels:
            _check_results(given)
        messages = list(_one_call_each(given)) if self.one_call else list(given)
        return [_with_thinking(message) for message in messages] if self.thinking else messages

    def tools(self, given: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        if not self.channels:
            return list(given)
        return [tool | {"function": {"description": "", **tool["function"]}} if "function" in tool else tool for tool in given]  # type: ignore[operator]

    def wish(self, name: str, value: Any) -> Any:
        """A variable that counts where the template reads it, in its words."""
        return _EFFORTS.get(value, value) if self.channels and name == "reasoning_effort" else value


def _check_results(messages: Sequence[Message]) -> None:
    """A result is told by the function's name, which only the call has. Raises RequestError."""
    has_call = False
    for i, message in enumerate(messages):
        if message.role == "assistant":
            has_call = bool(message.fields.get("tool_calls"))
        elif message.role == "tool" and not has_call:
            place, id = f"messages[{i}]", json.dumps(message.fields.get("tool_call_id"))[:80]
            raise RequestError(
                f"{place} is a tool's result (tool_call_id {id}) without its call: the last assistant message before it "
                "must have the call in its tool_calls",
                param=place,
            )


def _with_thinking(message: Message) -> Message:
    thought = message.fields.get("reasoning_content")
    if not thought or message.role != "assistant" or "thinking" in message.fields:
        return message
    said = "".join(part.text for part in message.parts if isinstance(part, Text))
    if not message.fields.get("tool_calls") or not said:
        return replace(message, fields={**message.fields, "thinking": thought})
    return replace(message, parts=[Text("")], fields={**message.fields, "thinking": f"{thought}\n{said}"})


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """A message of several calls as several, each with the result of its call behind it."""
    place = 0
    while place < len(messages):
        message, place = messages[place], place + 1
        calls = message.fields.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        results = []
        while place < len(messages) and messages[place].role == "tool":
            results.append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            if number:
                message = replace(message, parts=[Text("")], fields={})
            yield replace(message, fields={**message.fields, "tool_calls": [call]})
            own = [one for one in results if one.fields.get("tool_call_id") == call.get("id")]
            own = own or results[:1]  # without ids they are in the calls' order
            if number == len(calls) - 1:
                own = results
            yield from own
            results = [one for one in results if one not in own]
