"""From messages to token ids with the pictures' places: the chat template, rendered so that text stays text.

The template is rendered with random marks in place of everything that came from outside, and split there.
Special tokens are looked for in the template's own parts only; user text between them is encoded with
special tokens switched off. So no message can become a turn, a picture or an end, and on ordinary text
the result is the tokenizer's own.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlserve.errors import ModelError, RequestError
from vlserve.models.architecture import Positions, Span
from vlserve.models.checkpoint import Checkpoint
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.timing import Preparation
from vlserve.vision.pixels import Pixels

THINKING = ("<think>", "</think>")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
GUARD = "\u205f"  # white space that templates strip but never write
_MARK = re.compile(f"({GUARD}?)(\ue000[0-9a-f]{{16}}:[0-9]+\ue001)({GUARD}?)")


@dataclass(frozen=True, slots=True)
class Text:
    """Words of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a message, preprocessed."""

    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `parts` in the order given. A single text given as a plain string has `is_string`.

    `fields` are further keys that templates know, e.g. tool_calls, as JSON values.
    """

    role: str
    parts: Sequence[Text | Picture]
    is_string: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """What a prompt is made with beside the messages.

    Args:
        tools: JSON descriptions of functions, as OpenAI has them.
        variables: further variables of the template, e.g. enable_thinking. One that it does not use is refused.
        continue_final: the answer goes on where the last message ends.
        add_generation_prompt: open the assistant's turn.
        cache_salt: caches are shared only with prompts of the same salt.
        mm_processor_kwargs: what the model's preprocessing takes for one request, e.g. max_dynamic_patch.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    add_generation_prompt: bool = True
    cache_salt: str = ""
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    spans: list[Span]
    cache_salt: str = ""
    preparation: Preparation = field(default_factory=Preparation)
    positions: Positions | None = None  # None: one after another

    @property
    def num_image_tokens(self) -> int:
        return sum(span.layout.num_features for span in self.spans)


class PromptBuilder:
    """Reads a checkpoint's tokenizer and chat template once; `build` is called for every request."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._preprocessor = checkpoint.preprocessor
        self.tokenizer = Tokenizer(checkpoint.folder, self._preprocessor.control_tokens())
        self._kinds = self._read_placeholders()
        source = _read_template(checkpoint.folder, self.tokenizer.settings)
        self._template, self._known = _compile(source)
        self._shows_calls = "tool_calls" in source
        self._variables = {
            name: _content(value) for name, value in self.tokenizer.settings.items() if name.endswith("_token") and value
        }
        names = sorted((t for t in self.tokenizer.added if self.tokenizer.added[t]["special"]), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")

        words = (t for t in self.tokenizer.added if not self.tokenizer.added[t]["special"])
        self._markup = re.compile("(" + "|".join(map(re.escape, [*words, *THINKING])) + ")")

    def uses(self, variable: str) -> bool:
        """Whether the chat template reads a variable, e.g. tools."""
        return variable in self._known

    def build(self, messages: Sequence[Message], options: PromptOptions | None = None) -> Prompt:
        """Token ids of a conversation, with the answer's opening; raises RequestError when the template refuses it."""
        options = options or PromptOptions()
        self._check(options, messages)
        marks: dict[str, Text] = {}
        rendered = self._render(messages, options, marks)
        pictures = [part.pixels for message in messages for part in message.parts if isinstance(part, Picture)]
        ids: list[int] = []
        spans: list[Span] = []
        pending = ""  # ordinary text, of the template and of messages, up to the next special token
        strip = False
        for piece in self._pieces(rendered, marks):
            if isinstance(piece, Text):
                text = piece.text.lstrip() if strip and not pending else piece.text
                pending += text
                continue
            added = self.tokenizer.added[piece]
            ids += self.tokenizer.encode_plain(pending.rstrip() if added.get("lstrip") else pending)
            pending, strip = "", bool(added.get("rstrip"))
            if piece not in self._kinds:
                ids.append(self.tokenizer.token_id(piece))
                continue
            if len(spans) == len(pictures):
                raise ModelError("the chat template has a place for more pictures than the messages have")
            spans.append(self._span(len(ids), pictures[len(spans)]))
            ids += spans[-1].layout.token_ids
        ids += self.tokenizer.encode_plain(pending)
        if len(spans) != len(pictures):
            raise RequestError(
                f"the model's chat template has a place for {len(spans)} of {len(pictures)} pictures; "
                "some models take pictures in user messages only",
                param="messages",
            )
        beginning = self.tokenizer.beginning
        if beginning and ids[:1] != beginning:
            ids = beginning + ids
            spans = [replace(span, start=span.start + len(beginning)) for span in spans]
        if not ids:
            raise RequestError("the prompt is empty", param="messages")
        return Prompt(ids, spans, options.cache_salt, positions=self._preprocessor.positions(ids, spans))

    def encode_plain(self, text: str, beginning: bool) -> Prompt:
        """A raw text as a prompt, without the template; special tokens in it are ordinary characters."""
        return Prompt([*(self.tokenizer.beginning if beginning else ()), *self.tokenizer.encode_plain(text)], [])

    def _read_placeholders(self) -> dict[str, str]:
        """The kind of media by the token that the template writes for it."""
        try:
            placeholders = self._preprocessor.placeholders()
        except ValueError as error:
            raise ModelError(str(error)) from error
        for kind, placeholder in placeholders.items():
            if self.tokenizer.token_id(placeholder.token) != placeholder.id:
                raise ModelError(f"config.json's {kind}_token_id {placeholder.id} is not the id of {placeholder.token}")
        return {placeholder.token: kind for kind, placeholder in placeholders.items()}

    def _span(self, start: int, pixels: Pixels) -> Span:
        layout = self._preprocessor.layout(pixels, self.tokenizer)
        if layout.num_features != pixels.num_features:
            raise ModelError(f"a picture of {pixels.num_features} features was given {layout.num_features} places")
        return Span(start, layout, pixels)

    def _check(self, options: PromptOptions, messages: Sequence[Message]) -> None:
        if options.continue_final and (messages[-1].fields or not any(isinstance(p, Text) for p in messages[-1].parts)):
            raise RequestError("only a last message of text can be continued", param="continue_final_message")
        for i, message in enumerate(messages):
            if "tool_calls" in message.fields and not self._shows_calls:
                place = f"messages[{i}].tool_calls"
                raise RequestError(f"{place}: the model's chat template has no place for it", param=place)
        if options.tools and not self.uses("tools"):
            raise RequestError("the model's chat template has no place for tools", param="tools", code="unsupported_parameter")
        for name, value in options.variables.items():
            place = f"chat_template_kwargs.{name}"
            if name in RESERVED or not self.uses(name):
                raise RequestError(f"{place}: the model's chat template has no such variable", param=place)
            if not isinstance(value, (bool, int, float, str)) or self._special.search(str(value)) or len(str(value)) > 1024:
                raise RequestError(f"{place} must be a number, true, false or a short plain text", param=place)

    def _render(self, messages: Sequence[Message], options: PromptOptions, marks: dict[str, Text]) -> str:
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

        conversation = [{"role": m.role, "content": content(m), **guarded(m.fields)} for m in messages]
        last = f"\ue000{key}:{len(marks) - 1}\ue001"  # of the last text of the last message
        try:
            rendered = self._template.render(
                messages=conversation,
                tools=guarded(options.tools) or None,
                add_generation_prompt=options.add_generation_prompt and not options.continue_final,
                **self._variables,
                **options.variables,
            )
            return _cut_after(rendered, last) if options.continue_final else rendered
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template refused the messages: {error}", param="messages") from error
        except Exception as error:
            reason = type(error).__name__
            raise RequestError(f"the model's chat template cannot take these messages ({reason})", param="messages") from error

    def _pieces(self, rendered: str, marks: Mapping[str, Text]) -> list[Text | str]:
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
