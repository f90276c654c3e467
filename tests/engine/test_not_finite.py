"""Numbers that overflow end the requests that they are of, with an error that names the type; nobody is given a token of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.ranks import tp_engine
from tests.engine.reference import add, engine, prompt, run
from tests.engine.test_laws import picture
from tests.engine.test_sampling import sequence
from vlserve.config import SamplingParams, StructuredOutput
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.engine.sampling import Sampler

ERROR = "the model computed numbers in float16 that are not finite, so there is no next token; bfloat16"
ASKED = [
    SamplingParams(),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=3),
    SamplingParams(logprobs=3),
    SamplingParams(structured=StructuredOutput(choice=["yes", "no"])),
    SamplingParams(repetition_penalty=1.2, logit_bias={4: 2.0}, min_tokens=2),
]


@pytest.fixture(scope="module")
def overflowing(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose projector's products leave the range of float16; its weights do not."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(checkpoint("qwen2"), folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("multi_modal_projector.linear_2.weight"))
    weights[name] = weights[name] / weights[name].abs().max() * 60_000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def answers(engine: Engine, folder: Path, asked: list[SamplingParams]) -> tuple[list[list[TokenEvent]], list[TokenEvent]]:
    """Those about a picture, and one about a text in the same steps."""
    for i, sampling in enumerate(asked):
        add(engine, i, prompt(folder, "What is it?", [picture(1)]), sampling, 5)
    add(engine, len(asked), prompt(folder, "Who are you?"), SamplingParams(logprobs=2), 5)
    events = run(engine)
    return [events[i] for i in range(len(asked))], events[len(asked)]


def test_what_overflows_ends_with_an_error_and_others_go_on(overflowing: Path) -> None:
    make: dict[str, Any] = {"dtype": "float16", "max_num_batched_tokens": 64}
    (_, want), small = answers(engine(overflowing, **make), overflowing, []), engine(overflowing, **make)
    for _ in range(2):  # the second time features and prefix come from the caches
        pictures, text = answers(small, overflowing, ASKED)
        for events in pictures:
            (event,) = events
            assert event.finish_reason == "error" and event.token_id is None and event.logprob is None
            assert event.error is not None and event.error.startswith(ERROR)
        assert [e.token_id for e in text] == [e.token_id for e in want]


def test_bfloat16_has_the_range(overflowing: Path) -> None:
    pictures, _ = answers(engine(overflowing, dtype="bfloat16"), overflowing, ASKED)
    assert all(events[-1].finish_reason in ("stop", "length") for events in pictures)


def test_with_two_ranks(overflowing: Path) -> None:
    with tp_engine(overflowing, 2, dtype="float16") as (engine, _):
        pictures, text = answers(engine, overflowing, ASKED[:2])
    assert all(events[-1].error is not None and events[-1].error.startswith(ERROR) for events in pictures)
    assert text[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("sampling", ({}, {"temperature": 1.0, "seed": 1}, {"logprobs": 1}, {"temperature": 1.0, "top_p": 0.5}))
def test_one_number_of_a_row_is_enough(bad: float, sampling: dict[str, Any]) -> None:
    rows = torch.randn(3, 50)
    rows[1, 7] = bad
    drawn = Sampler(frozenset(), torch.float32).sample(rows, [sequence(id=i, **sampling) for i in range(3)])
    first, second, third = drawn.read()
    assert first.error is None and third.error is None
    assert second.error is not None and "numbers in float32 that are not finite" in second.error
    assert int(drawn.tokens.min()) >= 0 and int(drawn.tokens.max()) < 50, "the next step may read them before the host does"


def test_a_row_of_nothing_but_minus_infinity_has_no_token() -> None:
    (sampled,) = Sampler(frozenset(), torch.bfloat16).sample(torch.full((1, 9), float("-inf")), [sequence()]).read()
    assert sampled.error is not None and "its weights may be damaged" in sampled.error
