"""What a family answers wrongly is told to the one who asked; others are answered, and the engine lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.reference import add, engine, prompt, run, tokens
from tests.models.toy_family import TOY, ToyPreprocessor, make_toy
from vlserve.config import SamplingParams
from vlserve.engine.messages import Add, PromptPositions
from vlserve.errors import ModelError
from vlserve.models import registry
from vlserve.models.architecture import Layout, Positions
from vlserve.models.checkpoint import Checkpoint, read_checkpoint
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.conversation import Message, Picture, Text
from vlserve.vision.pixels import Pixels, Unit

PICTURE = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "toy", TOY)
        yield make_toy(tmp_path_factory.mktemp("toy"), ["full_attention", "sliding_attention"])


@dataclass(frozen=True)
class Faulty(ToyPreprocessor):
    given: Any = None

    def layout(self, *arguments: Any) -> Layout:
        return self.given if isinstance(self.given, Layout) else super().layout(*arguments)

    def positions(self, *arguments: Any) -> Positions:
        return self.given if isinstance(self.given, Positions) else super().positions(*arguments)


def built(folder: Path, given: Any) -> Prompt:
    read: Checkpoint = read_checkpoint(folder)
    assert isinstance(read.preprocessor, ToyPreprocessor)
    read = replace(read, preprocessor=Faulty(read.preprocessor.picture_id, given))
    message = Message("user", [Picture(read.preprocessor.prepare(PICTURE, "auto")), Text("What?")])
    return PromptBuilder(read).build([message])


@pytest.mark.parametrize(
    "given,message",
    [
        (Layout([1, 2], [(0, 2)]), "a picture of 4 features was given 2 places"),
        (Layout([1] * 4, [(0, 2), (1, 2)]), "layout of 4 tokens has runs"),
        (Layout([1] * 4, [(1, 4)]), "layout of 4 tokens has runs"),
        (Layout([1] * 4, [(0, 5), (5, -1)]), "layout of 4 tokens has runs"),
        (Layout([1, 1, 1, 1, -7], [(0, 4)]), "layout has token -7"),
        (Positions(axes=([0], [0], [0]), next=1), "expected 3 axes of as many"),
        (Positions(axes=([0] * 99,), next=1), "expected 3 axes of as many"),
    ],
    ids=str,
)
def test_layouts_and_positions_that_do_not_fit_are_named(given: Any, message: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=message):
        built(folder, given)


@pytest.mark.parametrize("numbers", ([-1], [1.5], [True]))
def test_positions_are_whole_numbers(numbers: list[Any], folder: Path) -> None:
    number = len(prompt(folder, "What?", [PICTURE]).token_ids)
    axes = tuple([0] * (number - 1) + numbers for _ in range(3))
    with pytest.raises(ModelError, match="positions are no whole numbers from 0 on"):
        built(folder, Positions(axes=axes, next=5))


@pytest.mark.parametrize("units", ((), (Unit((0, 4), 1),), (Unit((3,), 0),), (Unit((np.int64(3),), 1),)), ids=str)  # type: ignore[arg-type]
def test_units_are_whole_and_not_empty(units: tuple[Unit, ...]) -> None:
    with pytest.raises(ValueError, match="expected one or more, of whole numbers above 0"):
        Pixels(data=np.zeros(3, np.uint8), units=units, digest=bytes(32))


def test_positions_that_the_decoder_does_not_take_are_refused_by_the_engine(folder: Path) -> None:
    ours = engine(folder)
    wrong = PromptPositions(num_axes=2, numbers=bytes(2 * 3 * 4), next=3)
    with pytest.raises(ValueError, match="positions of 2 parts, and the decoder takes 3"):
        ours.add(Add(id=1, token_ids=[1, 2, 3], media=[], sampling=SamplingParams(), max_tokens=2, positions=wrong), [])


@pytest.mark.parametrize("error", (KeyError("x"), AssertionError("y"), StopIteration(), RuntimeError("z")), ids=repr)
def test_whatever_an_encoder_raises_ends_its_request_alone(error: Exception, folder: Path) -> None:
    ours = engine(folder)
    tower = ours.runner.model.tower
    assert tower is not None
    whole = tower.encode

    def broken(*arguments: Any) -> Any:
        raise error

    tower.encode = broken  # type: ignore[method-assign]
    add(ours, 0, prompt(folder, "What?", [PICTURE]), SamplingParams(), 3)
    assert run(ours)[0][-1].finish_reason == "error"
    tower.encode = lambda pixels, units: whole(pixels, units)[1:]  # type: ignore[method-assign]
    add(ours, 1, prompt(folder, "What?", [PICTURE]), SamplingParams(), 3)
    assert run(ours)[1][-1].finish_reason == "error"
    tower.encode = whole  # type: ignore[method-assign]
    add(ours, 2, prompt(folder, "What?", [PICTURE]), SamplingParams(ignore_eos=True), 3)
    assert len(tokens(run(ours)[2])) == 3


def test_positions_before_a_pictures_first_feature_are_part_of_what_a_block_holds(folder: Path) -> None:
    """A layout may begin with tokens whose positions depend on the picture; a picture of another size has others there."""
    wide = Image.fromarray(np.zeros((4, 40, 3), np.uint8))

    def positions(rows: int, number: int) -> Positions:
        return Positions(axes=([rows] * number, list(range(number)), list(range(number))), next=number)

    ours = engine(folder, block_size=1)
    for id, (image, rows) in enumerate(((PICTURE, 2), (wide, 50))):
        p = prompt(folder, "What?", [image])
        [span] = p.spans
        layout = Layout([1, 1, 1, *span.layout.token_ids], [(first + 3, number) for first, number in span.layout.runs])
        ids = [*p.token_ids[: span.start], *layout.token_ids, *p.token_ids[span.start + len(span.layout.token_ids) :]]
        add(ours, id, Prompt(ids, [replace(span, layout=layout)], positions=positions(rows, len(ids))), SamplingParams(), 1)
        assert run(ours)[id][0].cached_tokens == (0 if id == 0 else span.start)
