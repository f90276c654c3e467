"""A checkpoint's chat template, rendered so that text stays text.

The template is rendered with random marks in place of everything that came from outside, and split there: ordinary text, the
template's and the messages', and between it the special tokens that the template itself wrote.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlserve.errors import ModelError, RequestError
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.prompt.template_files import read_templates
from vlserve.prompt.template_wants import Wants
from vlserve.prompt.tokenizer import Tokenizer, token_text

log = logging.getLogger(__name__)
THINKING = ("<think>", "</think>")
SWITCHES = ("enable_thinking", "thinking")  # variables with which templates of the field switch thinking on and off
EFFORT = {"reasoning_effort", "enable_thinking"}  # of these wishes one is enough
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
GUARD = "\u205f"  # white space that templates strip but never write
_NAME = "\ue000[0-9a-f]{16}:[0-9]+"
_MARK = re.compile(f"({GUARD}?)({_NAME})([aj]*)\ue001({GUARD}?)")
_SHOWN_LIST = re.compile(r"\[\{'type': '(text|image|video)'")  # a list as Python writes it: the template expects texts
_IN_JSON = re.compile(f"({_NAME}[aj]*)\ue001")
_IN_ASCII = re.compile(r"\\ue000([0-9a-f]{16}:[0-9]+[aj]*)\\ue001")


class ChatTemplate:
    """Read and compiled once; raises ModelError when there is none or it is no Jinja."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, own: str | None = None, placeholders: Mapping[str, str] | None = None
    ) -> None:
        """`own`: the family's template, as `read_templates`. `placeholders`: the token for each kind of media."""
        self._placeholders = placeholders or {}
        templates = {name: _Template(source) for name, source in read_templates(folder, tokenizer.settings, own).items()}
        self._default = templates["default"]
        self._with_tools = templates.get("tool_use", self._default)
        named = {name: token_text(value) for name, value in tokenizer.settings.items() if name.endswith("_token")}
        self._variables = {name: token for name, token in named.items() if token}
        names = sorted((t for t in tokenizer.added if tokenizer.added[t]["special"]), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")
        self._said: set[str] = set()
        words = (t for t in tokenizer.added if not tokenizer.added[t]["special"])
        self._markup = re.compile("(" + "|".join(map(re.escape, [*words, *THINKING])) + ")")

    def uses(self, variable: str) -> bool:
        """Whether the chat template, or the one for tools, reads a variable."""
        return any(variable in template.variables for template in (self._default, self._with_tools))

    def pieces(self, messages: Sequence[Message], options: PromptOptions) -> list[Text | str]:
        """What it writes: ordinary text as Text, its special tokens as str; raises RequestError when it refuses the messages."""
        self._check(options, messages)
        variables, messages = self._read_variables(options), self._template(options).wants.messages(messages)
        failure: RequestError | None = None
        for others, as_texts in _alternatives(messages):
            marks: dict[str, Text] = {}
            try:
                rendered = self._render(others, options, variables, marks, as_texts=as_texts)
            except RequestError as error:
                failure = failure or error
                continue
            if _SHOWN_LIST.search(rendered) is None:
                return self._split(rendered, marks)
        raise failure or RequestError("the model's chat template takes texts only", param="messages")

    def _template(self, options: PromptOptions) -> _Template:
        """The one called tool_use for requests with tools, where there is one."""
        return self._with_tools if options.tools else self._default

    def _check(self, options: PromptOptions, messages: Sequence[Message]) -> None:
        last = messages[-1]
        if options.continue_final and (set(last.fields) - {"name"} or not any(isinstance(p, Text) for p in last.parts)):
            raise RequestError("only a last message of text can be continued", param="continue_final_message")
        template = self._template(options)
        for i, message in enumerate(messages):
            if "tool_calls" in message.fields and not template.shows_calls:
                place = f"messages[{i}].tool_calls"
                raise RequestError(f"{place}: the model's chat template has no place for it", param=place)
        if options.tools and "tools" not in template.variables:
            raise RequestError("the model's chat template has no place for tools", param="tools", code="unsupported_parameter")

    def _settable(self, template: _Template) -> set[str]:
        """Variables that the template reads and a request may set."""
        given = {*RESERVED, *self._variables, *template.jinja.globals}
        return {name for name in template.variables - given if not name.endswith("_token")}

    def _read_variables(self, options: PromptOptions) -> dict[str, Any]:
        """Those that the template reads; raises RequestError for one that it does not, unless that asks for what is so."""
        template, found = self._template(options), dict[str, Any]()
        for name, value in options.variables.items():
            place = f"chat_template_kwargs.{name}"
            if value is None:
                continue
            if name in SWITCHES and value is False and template.variables.isdisjoint(SWITCHES):
                self._say_once(name)
                continue
            if name not in self._settable(template):
                names = ", ".join(sorted(self._settable(template))) or "none"
                message = f"{place}: the model's chat template has no such variable; those that can be set: {names}"
                raise RequestError(message, param=place)
            plain = value if isinstance(value, list) else [value]
            is_plain = all(isinstance(one, (bool, int, float, str)) for one in plain)
            if not is_plain or self._special.search(str(value)) or len(str(value)) > 1024:
                raise RequestError(f"{place} must be a number, true, false or a short plain text, or a list of them", param=place)
            found[name] = value
        wishes = {name: template.wants.wish(name, value) for name, value in options.wishes.items() if name in template.variables}
        unheard = options.wishes.keys() - wishes.keys()
        for name in sorted(unheard - (EFFORT if wishes.keys() & EFFORT else {"enable_thinking"})):
            self._say_once(name)
        return wishes | found

    def _say_once(self, name: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.info("%s makes no difference: the model's chat template has no such variable", name)

    def _render(
        self,
        messages: Sequence[Message],
        options: PromptOptions,
        variables: Mapping[str, Any],
        marks: dict[str, Text],
        *,
        as_texts: bool,
    ) -> str:
        """The template's output, with a mark for each text; a blank on either side shows whether it was stripped."""
        key = secrets.token_hex(8)

        def mark(text: str) -> str:
            name = f"\ue000{key}:{len(marks)}"
            marks[name] = Text(text)
            return f"{GUARD}{name}\ue001{GUARD}"

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

        def joined(message: Message) -> str:
            """Parts as one text, with a picture's placeholder in its place."""
            return "\n".join(self._placeholders[p.pixels.kind] if isinstance(p, Picture) else mark(p.text) for p in message.parts)

        def guarded(value: Any) -> Any:
            """JSON from outside with marks for texts that hold a special token."""
            if isinstance(value, Mapping):
                return {guarded(name): guarded(inner) for name, inner in value.items()}
            if isinstance(value, (list, tuple)):
                return [guarded(inner) for inner in value]
            if isinstance(value, str) and self._special.search(value):
                return mark(value)
            return value

        try:
            shown = [joined(m) if as_texts and not m.is_string else content(m) for m in messages]
            conversation = [
                {"role": m.role, **guarded(m.fields), "content": text} for m, text in zip(messages, shown, strict=True)
            ]
            last = f"\ue000{key}:{len(marks) - 1}\ue001"  # of the last text of the last message
            rendered = self._template(options).jinja.render(
                messages=conversation,
                tools=guarded(self._template(options).wants.tools(options.tools)) or None,
                documents=None,
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
            text = text if match[4] else text.rstrip()
            for way in match[3]:
                text = json.dumps(text, ensure_ascii=way == "a")[1:-1]
            pieces.append(Text(text))
            last = match.end()
        template_part(rendered[last:])
        return pieces


def _alternatives(messages: Sequence[Message]) -> Iterator[tuple[Sequence[Message], bool]]:
    """What to render, one after another, until the template takes it; and whether parts are one text, for one that knows no
    lists of parts."""
    mapped = [_with_mappings(message) for message in messages]
    for as_texts in (False, True) if any(not message.is_string for message in messages) else (False,):
        yield messages, as_texts
        if mapped != list(messages):
            yield mapped, as_texts


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


class _Template:
    """A compiled template: the variables that it reads, and whether it shows earlier function calls."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        try:
            self.jinja = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is not valid Jinja: {error}") from error
        self.shows_calls = "tool_calls" in source
        self.wants = Wants.of(source)


class _Generation(Extension):
    """transformers' {% generation %}, which marks what the assistant said for training; here it is just shown."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


def render(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """What a template writes for messages as they are, up to the next answer; raises jinja2.TemplateError."""
    return str(_environment().from_string(source).render(messages=messages, add_generation_prompt=True, **variables))


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """transformers' filter. A mark in it notes that its text stands in JSON, `a` where that is ASCII."""
    written = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        written = _IN_ASCII.sub("\ue000\\1a\ue001", written)
        return written.replace(f"\\u{ord(GUARD):04x}\ue000", f"{GUARD}\ue000").replace(
            f"\ue001\\u{ord(GUARD):04x}", f"\ue001{GUARD}"
        )
    return _IN_JSON.sub("\\1j\ue001", written)
