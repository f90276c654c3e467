"""A conversation as a chat template takes it: messages of texts and preprocessed pictures, and how the prompt is to be made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlserve.vision.pixels import Pixels


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
        variables: further variables of the template, e.g. enable_thinking. One that it does not use is refused, but for thinking
            switched off where there is no switch.
        wishes: variables that count where the template uses them and `variables` has no others, e.g. reasoning_effort. Where it
            uses none of them that is logged once.
        continue_final: the answer goes on where the last message ends.
        add_generation_prompt: open the assistant's turn.
        only_final: a model whose answers have channels (harmony.py) answers in the final one at once.
        is_raw: the answer is wanted as the model writes it; one that has channels is told apart by them otherwise.
        cache_salt: caches are shared only with prompts of the same salt.
        mm_processor_kwargs: what the model's preprocessing takes for one request, e.g. max_dynamic_patch.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    wishes: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    add_generation_prompt: bool = True
    only_final: bool = False
    is_raw: bool = False
    cache_salt: str = ""
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
