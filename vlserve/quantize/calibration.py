"""Calibration samples: conversations from a JSONL file, or made up, as the token ids and pixels that the model is served with.

Shapes: T tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlserve.config import MediaConfig
from vlserve.errors import ConfigError, EngineError, RequestError
from vlserve.media.loader import PictureLoader
from vlserve.media.sources import scheme_of
from vlserve.models.architecture import Span
from vlserve.models.checkpoint import Checkpoint
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.chat_messages import ImagePart, Turn, read_messages
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.quantize.sample_conversations import make_conversation
from vlserve.quantize.settings import GENERATED, TEXT, Settings
from vlserve.vision.pixels import Pixels

HELD_OUT_EVERY = 8
WHOLE = PromptOptions(add_generation_prompt=False)


@dataclass(frozen=True, slots=True)
class Sample:
    token_ids: list[int]
    spans: list[Span]
    is_answer: list[bool]  # of each token: whether the model would say it as an assistant


def is_held_out(index: int, number: int) -> bool:
    """Every eighth of `number` samples, or the last one of fewer."""
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 or (number < HELD_OUT_EVERY and index == number - 1)


def find_calibration(settings: Settings) -> Path | None:
    """The JSONL file, if it is one; raises ConfigError when it cannot be read."""
    if settings.calibration in (None, GENERATED, TEXT):
        return None
    assert settings.calibration is not None
    path = Path(settings.calibration).expanduser()
    try:
        path.open("rb").close()
    except OSError as error:
        reason = f"{error.strerror}; give {GENERATED}, {TEXT} or a JSONL file"
        raise ConfigError(f"calibration {settings.calibration!r}: {reason}") from error
    return path


def read_samples(checkpoint: Checkpoint, settings: Settings, max_tokens: int) -> list[Sample]:
    """At most `settings.samples`; fewer where a file has no more. Raises ConfigError naming the line that is wrong."""
    builder = PromptBuilder(checkpoint)
    loader = PictureLoader(MediaConfig())
    samples = []
    try:
        for place, messages, folder in _conversations(settings):
            try:
                sample = _make_sample(messages, folder, checkpoint, builder, loader)
            except (RequestError, EngineError) as error:
                raise ConfigError(f"{place}: {error}") from error
            if len(sample.token_ids) > max_tokens:
                raise ConfigError(f"{place} has {len(sample.token_ids)} tokens, and the model's context is {max_tokens}")
            samples.append(sample)
    finally:
        loader.close()
    if len(samples) < 2:
        raise ConfigError(f"calibration {settings.calibration!r} has {len(samples)} conversations; expected 2 or more")
    return samples


def _conversations(settings: Settings) -> Iterator[tuple[str, Any, Path]]:
    """(where it stands, messages, the folder that paths start from)"""
    path = find_calibration(settings)
    if path is None:
        for index in range(settings.samples):
            with_picture = settings.calibration == GENERATED
            messages = make_conversation(settings.seed, index, with_picture=with_picture)
            yield f"sample {index + 1}", messages, Path()
        return
    number = 0
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            if not data.strip():
                continue
            if number == settings.samples:
                return
            place = f"{path} line {line}"
            try:
                document = json.loads(data)
            except ValueError as error:
                raise ConfigError(f"{place}: not valid JSON: {error}") from error
            if not isinstance(document, dict) or "messages" not in document:
                raise ConfigError(f'{place}: expected an object with messages, e.g. {{"messages": [...]}}')
            number += 1
            yield place, document["messages"], path.parent


def _make_sample(messages: Any, folder: Path, checkpoint: Checkpoint, builder: PromptBuilder, loader: PictureLoader) -> Sample:
    turns = read_messages(messages, local=True)
    turns = [replace(turn, parts=[_located(part, folder) for part in turn.parts]) for turn in turns]
    images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
    pixels = iter(asyncio.run(loader.load(images, checkpoint.preprocessor)))
    shown = [_message(turn, pixels) for turn in turns]
    whole = builder.build(shown, WHOLE)
    return Sample(whole.token_ids, whole.spans, _answers(shown, whole, builder, checkpoint.end_token_ids))


def _located(part: str | ImagePart, folder: Path) -> str | ImagePart:
    """Paths are allowed, and start from the file's folder."""
    if isinstance(part, str):
        return part
    source = part.source
    if scheme_of(source) in ("http", "https"):
        raise RequestError(f"{part.param}: pictures are read from files and data URLs; download {source[:100]}", param=part.param)
    if isinstance(source, str) and not scheme_of(source):
        source = str(folder / Path(source).expanduser())
    return replace(part, source=source, local=True)


def _message(turn: Turn, pixels: Iterator[Pixels]) -> Message:
    parts = [Text(part) if isinstance(part, str) else Picture(next(pixels)) for part in turn.parts]
    return Message(turn.role, parts, turn.is_string, turn.fields)


def _answers(messages: list[Message], whole: Prompt, builder: PromptBuilder, end_ids: frozenset[int]) -> list[bool]:
    """Which tokens are answers: what comes after the opening of an assistant's turn, up to the token that ends it.

    Where a template shows an earlier answer differently from one that is being given, nothing of it is counted.
    """
    is_answer = [False] * len(whole.token_ids)
    for index, message in enumerate(messages):
        if message.role != "assistant" or index == 0:
            continue
        opened = builder.build(messages[:index]).token_ids
        closed = builder.build(messages[: index + 1], WHOLE).token_ids
        if whole.token_ids[: len(opened)] == opened and whole.token_ids[: len(closed)] == closed:
            said = closed[len(opened) :]
            length = next((i + 1 for i, token in enumerate(said) if token in end_ids), len(said))
            is_answer[len(opened) : len(opened) + length] = [True] * length
    return is_answer
