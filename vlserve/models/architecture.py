"""The seam between the core and a family of models: what a family answers, and nothing else that the core may ask.

The front asks a `Preprocessor`: what becomes of a picture, which tokens stand for it, where each token stands. A rank asks the
`Model` (base.py) that `Architecture.build` makes: the decoder, and a tower that encodes. No torch here, and none at the top of
what a family's front half imports: the front starts without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlserve.errors import RequestError
from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import read_text_config
from vlserve.vision.pixels import Pixels

if TYPE_CHECKING:
    from PIL import Image

    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model
    from vlserve.vision.config import EncoderConfig

Config = Mapping[str, Any]  # config.json
Files = Mapping[str, Mapping[str, Any]]  # other JSON files of the checkpoint, by name; {} for one that is not there
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
BUILT_IN = "vlserve"
Detail = Literal["auto", "low", "high"]  # OpenAI's wish for a picture


class Vocabulary(Protocol):
    """What a family may ask of the tokenizer."""

    def token_id(self, token: str) -> int:
        """The id of a token; raises ModelError when there is none."""

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of ordinary text within a prompt: no tokenizer begins it with a blank as it would a text of its own."""


@dataclass(frozen=True, slots=True)
class Features:
    """So many places in a layout for features, each filled with a token until they are there."""

    number: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens that stand for a picture. `runs`: (first place, number) of the places that features go to, in order."""

    token_ids: list[int]
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, parts: Iterable[int | Features]) -> Layout:
        """From tokens and places for features, in order."""
        ids: list[int] = []
        runs: list[tuple[int, int]] = []
        for part in parts:
            if isinstance(part, Features):
                runs.append((len(ids), part.number))
                ids += [part.token_id] * part.number
            else:
                ids.append(part)
        return cls(ids, runs)

    @property
    def num_features(self) -> int:
        return sum(number for _, number in self.runs)


@dataclass(frozen=True, slots=True)
class Span:
    """A picture in a prompt; its layout begins at token `start`."""

    start: int
    layout: Layout
    pixels: Pixels

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first token, number) of the places for features, in the prompt."""
        return [(self.start + first, number) for first, number in self.layout.runs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Where a prompt's tokens stand: T numbers for each axis; the answer's tokens stand at `next` and on, on all axes."""

    axes: tuple[list[int], ...]
    next: int

    @property
    def furthest(self) -> int:
        """Of the prompt's tokens."""
        return max(map(max, self.axes))


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The token that the chat template writes for a picture, and its id by config.json."""

    token: str
    id: int


@dataclass(frozen=True, slots=True)
class EncoderBytes:
    """Of an encoder on every rank: its weights, and what one call of `Tower.encode` takes beside them at its fullest."""

    weights: int
    peak: int


class Preprocessor(ABC):
    """The front's half of a family, for one checkpoint. Immutable, and used by many threads at once."""

    @abstractmethod
    def placeholders(self) -> Mapping[str, Placeholder]:
        """By kind of media, as `Pixels.kind`; raises ValueError naming the key of config.json that is wrong."""

    @abstractmethod
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that count as special even where the tokenizer's file says otherwise."""

    @abstractmethod
    def prepare(self, image: Image.Image, detail: Detail) -> Pixels:
        """An RGB picture of any size from 1x1 to its units; in a worker thread."""

    @abstractmethod
    def count_features(self, width: int, height: int, detail: Detail) -> int:
        """How many features a picture of so many pixels will have, without seeing it."""

    @abstractmethod
    def most_features(self) -> int:
        """Of one picture; for the plan."""

    def chat_template(self) -> str | None:
        """Jinja, for a format that says in config.json how a conversation is written; files with a template come first."""
        return None

    def end_tokens(self) -> tuple[str, ...]:
        """Tokens that end an answer beside those that the checkpoint's files call so."""
        return ()

    def features_per_unit(self) -> int | None:
        """Where all units are worth the same; None where they are not."""
        return None

    @abstractmethod
    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        """The tokens that take the placeholder's place."""

    def positions(self, token_ids: Sequence[int], spans: Sequence[Span]) -> Positions | None:
        """Where the tokens stand; None where they simply follow one another. A token's position depends on what comes before it
        and on its own picture alone, or the prefix cache would give wrong answers."""
        return None

    def configured(self, options: Mapping[str, Any]) -> Preprocessor:
        """With a request's `mm_processor_kwargs`; raises RequestError naming the one that is wrong."""
        for name in options:
            param = f"mm_processor_kwargs.{str(name)[:100]}"
            raise RequestError(f"{param} is not supported by this model", param=param, code="unsupported_parameter")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models.

    Args:
        preprocessor: (config.json, the checkpoint's other JSON files by name) -> its front half. Runs in the front, before torch
            is imported. Raises ValueError naming the key that is wrong.
        build: (config.json, the front half, how the language model is split) -> this rank's model without weights, on torch's
            meta device. Runs in the rank. Raises ValueError naming the key that is wrong.
        decoder: config.json -> the decoder's sizes, for the plan and the check of degrees; `text_config` where it is one of ours.
            Raises ValueError.
        encoder: config.json -> the sizes of the vision encoder, from which the plan computes its bytes; None where it is to be
            built on the meta device and counted. Raises ValueError.
        sizes: (config.json, the front half, bytes of a number) -> the encoder's bytes, where it is not of the kind that `encoder`
            tells. Raises ValueError.
        text_model_type: of a `text_config` that names none; "" where it must.
        language_model: the same without pictures, for `--language-model-only`; None where that is not served.
    """

    preprocessor: Callable[[Config, Files], Preprocessor]
    build: Callable[[Config, Any, Split], Model]
    decoder: Callable[[Config], DecoderConfig] = read_text_config
    encoder: Callable[[Config], EncoderConfig] | None = None
    sizes: Callable[[Config, Any, int], EncoderBytes] | None = None
    text_model_type: str = ""
    language_model: Architecture | None = None
    origin: str = BUILT_IN  # the package and entry point, for messages; filled in by find_architecture

    @property
    def is_built_in(self) -> bool:
        """Whether it is vlserve's own."""
        return self.origin == BUILT_IN
