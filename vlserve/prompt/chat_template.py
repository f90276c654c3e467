"""A checkpoint's chat template, rendered so that text stays text.

The template is rendered with random marks in place of everything that came from outside, and split there: ordinary text, the
template's and the messages', and between it the special tokens that the template itself wrote.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlserve.errors import ModelError, RequestError
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.prompt.tokenizer import Tokenizer

log = logging.getLogger(__name__)
THINKING = ("<think>", "</think>")
SWITCHES = ("enable_thinking", "thinking")  # variables with which templates of the field switch thinking on and off
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
GUARD = "\u205f"  # white space that templates strip but never write
_MARK = re.compile(f"({GUARD}?)(\ue000[0-9a-f]{{16}}:[0-9]+\ue001)({GUARD}?)")


class ChatTemplate:
    """Read and compiled once; raises ModelError when there is none or it is no Jinja."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        source = _read_template(folder, tokenizer.settings)
        self._template, self._known = _compile(source)
        self._shows_calls = "tool_calls" in source
        self._variables = {
            name: _content(value) for name, value in tokenizer.settings.items() if name.endswith("_token") and value
        }
        names = sorted((t for t in tokenizer.added if tokenizer.added[t]["special"]), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")

        self._said: set[str] = set()
        words = (t for t in tokenizer.added if not tokenizer.added[t]["special"])
        self._markup = re.compile("(" + "|".join(map(re.escape, [*words, *THINKING])) + ")")

    @property
    def _settable(self) -> frozenset[str]:
        """Variables that the template reads and a request may set."""
        given = {*RESERVED, *self._variables, *self._template.globals}
        return frozenset(name for name in self._known - given if not name.endswith("_token"))

    def uses(self, variable: str) -> bool:
        """Whether the chat template reads a variable, e.g. tools."""
        return variable in self._known

    def pieces(self, messages: Sequence[Message], options: PromptOptions) -> list[Text | str]:
        """What it writes: ordinary text as Text, its special tokens as str; raises RequestError when it refuses the messages."""
        self._check(options, messages)
        variables = self._read_variables(options)
        marks: dict[str, Text] = {}
        try:
            rendered = self._render(messages, options, variables, marks)
        except RequestError:
            others = [_with_mappings(message) for message in messages]
            if others == list(messages):
                raise
            marks = {}
            rendered = self._render(others, options, variables, marks)
        return self._split(rendered, marks)

    def _check(self, options: PromptOptions, messages: Sequence[Message]) -> None:
        last = messages[-1]
        if options.continue_final and (set(last.fields) - {"name"} or not any(isinstance(p, Text) for p in last.parts)):
            raise RequestError("only a last message of text can be continued", param="continue_final_message")
        for i, message in enumerate(messages):
            if "tool_calls" in message.fields and not self._shows_calls:
                place = f"messages[{i}].tool_calls"
                raise RequestError(f"{place}: the model's chat template has no place for it", param=place)
        if options.tools and not self.uses("tools"):
            raise RequestError("the model's chat template has no place for tools", param="tools", code="unsupported_parameter")

    def _read_variables(self, options: PromptOptions) -> dict[str, Any]:
        """Those that the template reads; raises RequestError for one that it does not, unless that asks for what is so."""
        found: dict[str, Any] = {}
        for name, value in options.variables.items():
            place = f"chat_template_kwargs.{name}"
            if value is None:
                continue
            if name in SWITCHES and value is False and not any(map(self.uses, SWITCHES)):
                self._say_once(name)
                continue
            if name not in self._settable:
                names = ", ".join(sorted(self._settable)) or "none"
                message = f"{place}: the model's chat template has no such variable; those that can be set: {names}"
                raise RequestError(message, param=place)
            if not isinstance(value, (bool, int, float, str)) or self._special.search(str(value)) or len(str(value)) > 1024:
                raise RequestError(f"{place} must be a number, true, false or a short plain text", param=place)
            found[name] = value
        wishes = {name: value for name, value in options.wishes.items() if self.uses(name)}
        if options.wishes and not wishes:
            self._say_once(next(iter(options.wishes)))
        return wishes | found

    def _say_once(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.info("%s makes no difference: the model's chat template has no such variable", name)

    def _render(
        self, messages: Sequence[Message], options: PromptOptions, variables: Mapping[str, Any], marks: dict[str, Text]
    ) -> str:
        """The template's output, with a mark for each text; a blank on either side shows whether it was stripped."""
        key = secrets.token_hex(8)

        def mark(text: str) -> str:
            name = f"\ue000{key}:{len(marks)}\ue001"
            marks[name] = Text(text)
            return f"{GUARD}{name}{GUARD}"

        def content(message: Message) -> str | list[dict[str, Any]]:
            if message.is_string:
                text = "".join(part.text for part in message.parts if isinstance(part, Text))
                if message.role != "assistant":
                    return mark(text)
                # templates cut an earlier answer at <think> and the like, so these must stay visible
                *pieces, end = self._markup.split(text)
                seen = "".join(t if i % 2 else mark(t) for i, t in enumerate(pieces) if t)
                return seen + mark(end) if end or options.continue_final else seen
            return [
                {"type": p.pixels.kind} if isinstance(p, Picture) else {"type": "text", "text": mark(p.text)}
                for p in message.parts
            ]

        def guarded(value: Any) -> Any:
            """JSON from outside with marks for texts that hold a special token; written as JSON has them inside quotes."""
            if isinstance(value, Mapping):
                return {guarded(name): guarded(inner) for name, inner in value.items()}
            if isinstance(value, (list, tuple)):
                return [guarded(inner) for inner in value]
            if isinstance(value, str) and self._special.search(value):
                return mark(json.dumps(value, ensure_ascii=False)[1:-1])
            return value

        try:
            conversation = [{"role": m.role, **guarded(m.fields), "content": content(m)} for m in messages]
            last = f"\ue000{key}:{len(marks) - 1}\ue001"  # of the last text of the last message
            rendered = self._template.render(
                messages=conversation,
                tools=guarded(options.tools) or None,
                add_generation_prompt=options.add_generation_prompt and not options.continue_final,
                **self._variables,
                **variables,
            )
            return _cut_after(rendered, last) if options.continue_final else rendered
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refused the messages: {error}", param="messages") from error
        except Exception as error:
            reason = type(error).__name__
            raise RequestError(f"the model's chat template cannot take these messages ({reason})", param="messages") from error

    def _split(self, rendered: str, marks: Mapping[str, Text]) -> list[Text | str]:
        """Ordinary text as Text, special tokens of the template as str."""
        pieces: list[Text | str] = []

        def template_part(text: str) -> None:
            last = 0
            for match in self._special.finditer(text):
                pieces.extend((Text(text[last : match.start()]), match[0]))
                last = match.end()
            pieces.append(Text(text[last:]))

        last = 0
        for match in _MARK.finditer(rendered):
            if match[2] not in marks:
                continue
            template_part(rendered[last : match.start()])
            text = marks[match[2]].text
            text = text if match[1] else text.lstrip()
            pieces.append(Text(text if match[3] else text.rstrip()))
            last = match.end()
        template_part(rendered[last:])
        return pieces


def _with_mappings(message: Message) -> Message:
    """Arguments of calls that are text, since they are no JSON, as a mapping: some templates walk through the arguments only."""
    calls = [
        call | {"function": call["function"] | {"arguments": {"arguments": call["function"]["arguments"]}}}
        if isinstance(call["function"]["arguments"], str)
        else call
        for call in message.fields.get("tool_calls", ())
    ]
    return replace(message, fields={**message.fields, "tool_calls": calls}) if calls else message


def _cut_after(rendered: str, mark: str) -> str:
    place = rendered.rfind(mark)
    if place < 0:
        raise RequestError("the last message has no text in the chat template's output to go on from", param="messages")
    return rendered[: place + len(mark)] + GUARD


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str:
    """chat_template.jinja, chat_template.json or tokenizer_config.json, in transformers' order."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if (folder / "chat_template.json").exists():
        template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise ModelError(
            f"{folder}: checkpoint file missing: chat_template.jinja (and no chat_template in tokenizer_config.json)"
        )
    return template


def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, and the variables that it reads."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error}") from error
