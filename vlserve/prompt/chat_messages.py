"""Reads OpenAI-style messages, and the shorter prompts that `VLPipeline` takes, into turns with their pictures' sources.

Pictures are named here, not loaded. Raises RequestError with the field's place, e.g. messages[0].content[1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlserve.errors import RequestError
from vlserve.models.architecture import Detail

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
STANDS_FOR = {"developer": "system", "function": "tool"}  # what chat templates know them as
TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # kinds of parts, and where they have it
REASONING = ("reasoning_content", "reasoning")  # the field's two spellings
DETAILS: Mapping[str, Detail] = {"auto": "auto", "low": "low", "high": "high", "original": "high"}  # as sent, and as known here
# of one picture, as LMDeploy's clients send them beside its URL; which of them the model knows, its preprocessor says
PICTURE_OPTIONS = ("max_dynamic_patch", "min_pixels", "max_pixels", "resized_height", "resized_width")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """Something that names or is a picture. `local`: a path is allowed. `detail`: OpenAI's wish; its original is high.

    `options`: what the model's preprocessing is to do with this picture, as `mm_processor_kwargs` for a request; they stand
    in `options_param`.
    """

    source: Any
    param: str
    local: bool
    detail: Detail = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    options_param: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message; `fields` are further keys for the chat template, e.g. tool_calls."""

    role: str
    parts: Sequence[str | ImagePart]
    is_string: bool
    fields: Mapping[str, Any] = field(default_factory=dict)


IMAGE_KEYS = ("image", "source", "url", "base64", "data")  # of a part of type image: what holds the picture


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def is_batch(prompt: Any) -> bool:
    """A list that is not itself one conversation."""
    return isinstance(prompt, list) and not is_conversation(prompt)


def read_prompt(prompt: Any) -> list[Turn]:
    """One prompt of `VLPipeline`: a text, (text, picture), (text, [pictures]) or messages."""
    if isinstance(prompt, str):
        return [Turn(role="user", parts=[_read_text(prompt, "prompt")], is_string=True)]
    if isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[0], str):
        text, images = prompt
        images = images if isinstance(images, (list, tuple)) else [images]
        parts = [ImagePart(source=image, param=f"images[{i}]", local=True) for i, image in enumerate(images)]
        return [Turn(role="user", parts=[*parts, _read_text(text, "prompt")], is_string=False)]
    if is_conversation(prompt):
        return read_messages(prompt, local=True)
    raise RequestError(
        f"a prompt is a text, (text, picture), (text, [pictures]) or a list of messages; got {type(prompt).__name__}",
        param="prompt",
    )


def read_messages(messages: Any, *, local: bool) -> list[Turn]:
    """OpenAI-style messages, or one user's text; `local` also allows {"type": "image", "image": path | PIL | bytes | array}.

    Keys that are not known are left out: clients send back all that they were given, with notes of their own.
    """
    if isinstance(messages, str) and messages:
        return [Turn(role="user", parts=[_read_text(messages, "messages")], is_string=True)]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list with at least one message", param="messages")
    return [_read_message(message, f"messages[{i}]", local) for i, message in enumerate(messages)]


def _read_message(message: Any, param: str, local: bool) -> Turn:
    if not isinstance(message, Mapping):
        raise RequestError(f"{param} must be an object with role and content", param=param)
    role: Any = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{param}.role is {role!r}; expected one of {', '.join(ROLES)}", param=f"{param}.role")
    role = STANDS_FOR.get(role, role)
    fields = _read_fields(message, role, param)
    content = message.get("content")
    if role == "assistant" and not content:
        content = message.get("refusal")  # what was said in its place
    if role in ("assistant", "tool") and not content:
        content = ""
    if isinstance(content, str):
        return Turn(role=role, parts=[_read_text(content, f"{param}.content")], is_string=True, fields=fields)
    if not isinstance(content, Sequence) or not content:
        what = f"must be a text or a list of parts, of one part or more; {role} messages may have an empty text"
        raise RequestError(f"{param}.content {what}", param=f"{param}.content")
    parts = [_read_part(part, f"{param}.content[{i}]", local) for i, part in enumerate(content)]
    if role in ("assistant", "tool") and all(isinstance(part, str) for part in parts):  # templates expect one text here
        return Turn(role=role, parts=["".join(map(str, parts))], is_string=True, fields=fields)
    return Turn(role=role, parts=parts, is_string=False, fields=fields)


def _read_fields(message: Mapping[str, Any], role: str, param: str) -> dict[str, Any]:
    """What a message has beside its content, for the chat template."""
    fields: dict[str, Any] = {}
    for name in ("name", "tool_call_id") if role == "tool" else ("name",):
        if message.get(name):
            fields[name] = _read_text(message[name], f"{param}.{name}")
    if message.get("audio"):
        raise RequestError(f"{param}.audio is not supported; send its transcript as content", param=f"{param}.audio")
    calls = message.get("tool_calls") or []
    if not calls and message.get("function_call"):  # as OpenAI had it before
        calls = [{"function": message["function_call"]}]
    if calls and role != "assistant":
        reason = f"{param}.tool_calls is not supported in {role} messages; an assistant's message has them"
        raise RequestError(reason, param=f"{param}.tool_calls", code="unsupported_parameter")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{param}.tool_calls must be a list", param=f"{param}.tool_calls")
    if calls:
        fields["tool_calls"] = [_read_call(call, f"{param}.tool_calls[{i}]") for i, call in enumerate(calls)]
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    if reasoning is None and isinstance(message.get("thinking"), str):  # GPT-OSS's and Ollama's name
        reasoning = message["thinking"] or None
    if reasoning is not None and role == "assistant":
        fields["reasoning_content"] = _read_text(reasoning, f"{param}.reasoning_content")
    return fields


def _read_call(call: Any, param: str) -> dict[str, Any]:
    """One function call of an earlier answer; templates want its arguments as an object, the API has them as text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or (call.get("type") or "function") != "function":
        raise RequestError(f'{param} must be {{"type": "function", "function": {{"name", "arguments"}}}}', param=param)
    name = _read_text(function.get("name"), f"{param}.function.name")
    arguments = _read_arguments(function.get("arguments"), f"{param}.function.arguments")
    fields = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return fields | ({"id": _read_text(call["id"], f"{param}.id")} if call.get("id") else {})


def _read_arguments(given: Any, param: str) -> dict[str, Any] | str:
    """An object where it is one; else the text as it is, e.g. of a call that was cut."""
    if isinstance(given, Mapping):
        return dict(given)
    text = _read_text(given or "{}", param)
    try:
        arguments = json.loads(text)
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _read_part(part: Any, param: str, local: bool) -> str | ImagePart:
    if isinstance(part, str):
        return _read_text(part, param)
    if not isinstance(part, Mapping):
        raise RequestError(f"{param} must be an object with a type", param=param)
    kind = part.get("type")
    if isinstance(kind, str) and kind in TEXTS:
        return _read_text(part.get(TEXTS[kind]), f"{param}.{TEXTS[kind]}")
    if kind in ("image_url", "input_image") or (kind == "image" and part.get("image_url") is not None):
        return _read_image_url(part, f"{param}.image_url")
    if kind == "image":
        return _read_image(part, param, local)
    if kind == "file":
        return _read_file(part.get("file"), f"{param}.file")
    if kind == "input_file":
        return _read_file(part, param)
    shown = "missing" if kind is None else repr(kind)[:64]
    raise RequestError(f"{param}.type is {shown}; expected text, image_url, image or file", param=f"{param}.type")


def _read_image_url(part: Mapping[str, Any], param: str) -> ImagePart:
    value = part.get("image_url")
    if isinstance(value, Mapping):
        _refuse_others(value, ("url", "detail", *PICTURE_OPTIONS), param)
    url, detail = (value.get("url"), value.get("detail")) if isinstance(value, Mapping) else (value, None)
    detail = part.get("detail") if detail is None else detail  # OpenAI has it inside; some clients put it beside
    if not isinstance(url, str):
        raise RequestError(f'{param} must be {{"url": "..."}}', param=param)
    if detail is not None and (not isinstance(detail, str) or detail not in DETAILS):
        raise RequestError(f"{param}.detail is {detail!r}; expected {', '.join(DETAILS)}", param=f"{param}.detail")
    beside, within = _picture_options(part), _picture_options(value) if isinstance(value, Mapping) else {}
    return ImagePart(
        source=url,
        param=param,
        local=False,
        detail=DETAILS["auto" if detail is None else detail],
        options=beside | within,
        options_param=param if within else param.removesuffix(".image_url"),
    )


def _read_image(part: Mapping[str, Any], param: str, local: bool) -> ImagePart:
    """`image` (in Python also a path, PIL image, bytes or array), Anthropic's `source`, `url`, `base64`, or `data` (MCP)."""
    name = next((name for name in IMAGE_KEYS if part.get(name) is not None), "image")
    value, field = part.get(name), f"{param}.{name}"
    if value is None:
        raise RequestError(f"{param}.image is missing", param=f"{param}.image")
    if name == "source":
        value = _read_source(value, field)
    elif name in ("base64", "data"):
        value = _data_url(value, part.get("mimeType"), field, f"{param}.mimeType")
    elif name == "image" and isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    elif not isinstance(value, str) and (name == "url" or not local):
        raise RequestError(f"{field} must be a data: or http(s): URL", param=field)
    is_local = local and name == "image"
    return ImagePart(source=value, param=field, local=is_local, options=_picture_options(part), options_param=param)


def _read_source(source: Any, param: str) -> str:
    """Anthropic's: base64 with a media_type, or a url."""
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "base64":
        return _data_url(source.get("data"), source.get("media_type"), f"{param}.data", f"{param}.media_type")
    if kind == "url":
        return _read_text(source.get("url"), f"{param}.url")
    expected = '{"type": "base64", "media_type": "image/png", "data": "..."} or {"type": "url", "url": "..."}'
    raise RequestError(f"{param} must be {expected}", param=param)


def _read_file(file: Any, param: str) -> ImagePart:
    """OpenAI's file, where it is a picture in a data URL."""
    if not isinstance(file, Mapping):
        raise RequestError(f'{param} must be {{"file_data": "data:image/png;base64,..."}}', param=param)
    for name in ("file_id", "file_url"):
        if file.get(name):
            reason = f"{param}.{name} is not supported; send a picture as file_data, data:image/png;base64,..."
            raise RequestError(reason, param=f"{param}.{name}", code="unsupported_parameter")
    data, field = file.get("file_data"), f"{param}.file_data"
    head = data.lstrip()[:11].lower() if isinstance(data, str) else ""
    if not head.startswith("data:image/"):
        raise RequestError(f"{field} must be a picture, data:image/png;base64,...; other files are not supported", param=field)
    return ImagePart(source=data, param=field, local=False)


def _data_url(data: Any, media_type: Any, param: str, type_param: str) -> str:
    if not isinstance(data, str):
        raise RequestError(f"{param} must be a picture as base64", param=param)
    if media_type is not None and not str(media_type).lower().startswith("image/"):
        raise RequestError(f"{type_param} is {str(media_type)[:100]!r}; expected a picture's, e.g. image/png", param=type_param)
    return data if data[:5].lower() == "data:" else f"data:;base64,{data}"


def _picture_options(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in PICTURE_OPTIONS if given.get(name) is not None}


def _read_text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a text", param=param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half a character (a lone surrogate)", param=param) from None
    return value


def _refuse_others(given: Mapping[str, Any], known: Sequence[str], param: str) -> None:
    """Nothing is accepted and ignored: a key that is not known must be null or empty."""
    for key, value in given.items():
        if key not in known and value not in (None, [], {}, ""):
            raise RequestError(f"{param}.{key} is not supported", param=f"{param}.{key}", code="unsupported_parameter")
