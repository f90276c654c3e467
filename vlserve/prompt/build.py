"""From a conversation to token ids with the pictures' places. What the chat template writes is chat_template.py's.

Special tokens are those of the template's own parts only (tokenizer.py). So no message can become a turn, a picture or an end,
and on ordinary text the result is the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vlserve.errors import ModelError, RequestError
from vlserve.models.architecture import Placeholder, Positions, Preprocessor, Span
from vlserve.models.checkpoint import Checkpoint
from vlserve.prompt.chat_template import ChatTemplate
from vlserve.prompt.conversation import Message, Picture, PromptOptions
from vlserve.prompt.harmony import final_opening, opened
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.timing import Preparation
from vlserve.vision.pixels import Pixels


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    spans: list[Span]
    cache_salt: str = ""
    preparation: Preparation = field(default_factory=Preparation)
    positions: Positions | None = None  # None: one after another
    opened: str | None = None  # what an answer that is told apart by Harmony's channels goes on from

    @property
    def num_image_tokens(self) -> int:
        return sum(span.layout.num_features for span in self.spans)


class PromptBuilder:
    """Reads a checkpoint's tokenizer and chat template once; `build` is called for every request."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._preprocessor = checkpoint.preprocessor
        placeholders = self._read_placeholders()
        tokens = [placeholder.token for placeholder in placeholders.values()]
        self.tokenizer = Tokenizer(checkpoint.folder, [*self._preprocessor.control_tokens(), *tokens])
        for kind, placeholder in placeholders.items():
            if self.tokenizer.token_id(placeholder.token) != placeholder.id:
                raise ModelError(f"config.json's {kind}_token_id {placeholder.id} is not the id of {placeholder.token}")
        self._places = {placeholder.id for placeholder in placeholders.values()}
        self._num_axes = _num_axes(checkpoint)
        tokens_of = {kind: placeholder.token for kind, placeholder in placeholders.items()}
        self.template = ChatTemplate(checkpoint.folder, self.tokenizer, self._preprocessor.chat_template(), tokens_of)

    def build(self, messages: Sequence[Message], options: PromptOptions | None = None) -> Prompt:
        """Token ids of a conversation, with the answer's opening; raises RequestError when the template refuses it."""
        options = options or PromptOptions()
        preprocessor = self._preprocessor.configured(options.mm_processor_kwargs)
        pictures = [part.pixels for message in messages for part in message.parts if isinstance(part, Picture)]
        ids: list[int] = []
        spans: list[Span] = []
        for id in self.tokenizer.encode_rendered(self.template.pieces(messages, options)):
            if id not in self._places:
                ids.append(id)
                continue
            if len(spans) == len(pictures):
                raise ModelError("the chat template has a place for more pictures than the messages have")
            spans.append(self._span(preprocessor, len(ids), pictures[len(spans)]))
            ids += spans[-1].layout.token_ids
        if len(spans) != len(pictures):
            raise RequestError(
                f"the model's chat template has a place for {len(spans)} of {len(pictures)} pictures; "
                "some models take pictures in user messages only",
                param="messages",
            )
        beginning = self.tokenizer.beginning
        if beginning and not self.tokenizer.has_beginning(ids):
            ids = beginning + ids
            spans = [replace(span, start=span.start + len(beginning)) for span in spans]
        if options.only_final:
            ids += final_opening(ids, self.tokenizer)
        if not ids:
            raise RequestError("the prompt is empty", param="messages")
        positions = self._positions(preprocessor, ids, spans)
        behind = None if options.is_raw else opened(ids, self.tokenizer)
        return Prompt(ids, spans, options.cache_salt, positions=positions, opened=behind)

    def encode_plain(self, text: str, beginning: bool) -> Prompt:
        """A raw text as a prompt, without the template; special tokens in it are ordinary characters."""
        return Prompt(
            [*(self.tokenizer.beginning if beginning else ()), *self.tokenizer.encode_plain(text, at_beginning=True)], []
        )

    def _read_placeholders(self) -> Mapping[str, Placeholder]:
        """The token that the template writes for each kind of media."""
        try:
            return self._preprocessor.placeholders()
        except ValueError as error:
            raise ModelError(str(error)) from error

    def _span(self, preprocessor: Preprocessor, start: int, pixels: Pixels) -> Span:
        layout = preprocessor.layout(pixels, self.tokenizer)
        if layout.num_features != pixels.num_features:
            raise ModelError(f"a picture of {pixels.num_features} features was given {layout.num_features} places")
        stop = 0
        for first, number in layout.runs:
            if first < stop or number < 1 or first + number > len(layout.token_ids):
                raise ModelError(f"a picture's layout of {len(layout.token_ids)} tokens has runs {layout.runs[:9]}")
            stop = first + number
        if min(layout.token_ids) < 0:
            raise ModelError(f"a picture's layout has token {min(layout.token_ids)}")
        return Span(start, layout, pixels)

    def _positions(self, preprocessor: Preprocessor, ids: Sequence[int], spans: Sequence[Span]) -> Positions | None:
        positions = preprocessor.positions(ids, spans)
        if positions is None:
            return None
        if len(positions.axes) != self._num_axes or any(len(axis) != len(ids) for axis in positions.axes):
            sizes = [len(axis) for axis in positions.axes]
            raise ModelError(f"positions of {sizes} numbers for {len(ids)} tokens; expected {self._num_axes} axes of as many")
        kinds = {type(positions.next), *(type(place) for axis in positions.axes for place in axis)}
        if kinds != {int} or min(positions.next, *map(min, positions.axes)) < 0:
            raise ModelError("positions are no whole numbers from 0 on")
        return positions


def _num_axes(checkpoint: Checkpoint) -> int:
    """Numbers that a token's position has in this model's decoder."""
    try:
        return checkpoint.architecture.decoder(checkpoint.config).num_position_axes
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{checkpoint.folder.name}: {error}") from error
