"""Streamed text equals the final text, whole characters only, and ends before (or after) a stop text."""

from __future__ import annotations

import random

import pytest

from tests.checkpoints import make_tokenizer
from vlserve.config import SamplingParams
from vlserve.pipeline.stop_strings import AnswerText
from vlserve.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def pieces(tokenizer: Tokenizer, ids: list[int], **params: object) -> list[str]:
    text = AnswerText(tokenizer, SamplingParams(**params))  # type: ignore[arg-type]
    out = []
    for id in ids:
        out.append(text.add(id))
        if text.stopped:
            return out
    return [*out, text.finish()]


@pytest.mark.parametrize("text", ["A circle.", "é 漢字 🙂👩‍👩‍👧 ok", " lead", "a\n\nb", "🙂" * 9, "\u200b"])
def test_streamed_equals_final(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_plain(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in got)


@pytest.mark.parametrize("seed", range(60))
def test_streamed_equals_final_for_any_tokens(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.num_tokens) for _ in range(rng.randint(1, 40))]
    for skip in (True, False):
        assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_half_a_character_at_the_end_becomes_a_sign(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("ok 🙂")[:-1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\ufffd")


@pytest.mark.parametrize("stop", ["circle", "c", " and", ".", "le an", "🙂"])
def test_a_stop_text_ends_the_answer_before_it(tokenizer: Tokenizer, stop: str) -> None:
    text = "A red circle and 🙂 more. The end"
    ids = tokenizer.encode_plain(text)
    want = text[: text.index(stop)]
    assert "".join(pieces(tokenizer, ids, stop=stop)) == want
    assert "".join(pieces(tokenizer, ids, stop=stop, include_stop_str_in_output=True)) == want + stop


def test_the_first_of_several_stop_texts_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("one two three")
    assert "".join(pieces(tokenizer, ids, stop=("three", "two"))) == "one "
    assert "".join(pieces(tokenizer, ids, stop=("twofold",))) == "one two three"


def test_stop_texts_wait_for_the_minimum(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("a. b. c. d.")
    assert "".join(pieces(tokenizer, ids, stop=".", min_tokens=len(ids) - 1)).count(".") >= 2
