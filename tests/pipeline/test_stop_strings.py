"""Streamed text equals the final text, whole characters only, and ends before (or after) a stop text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.checkpoints import make_tokenizer
from vlserve.config import SamplingParams
from vlserve.pipeline.stop_strings import AnswerText, with_stop_tokens
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


def test_a_stop_text_may_name_special_tokens_that_are_left_out(tokenizer: Tokenizer) -> None:
    end, start = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|im_start|>")
    ids = [*tokenizer.encode_plain("one"), end, *tokenizer.encode_plain("\n"), start, *tokenizer.encode_plain("user two")]
    for stop in ("<|im_end|>\n<|im_start|>user", "\n<|im_start|>", "<|im_start|>us"):
        before = "one" if stop.startswith("<|im_end|>") else "one\n" if stop.endswith("us") else "one"
        assert "".join(pieces(tokenizer, ids, stop=stop)) == before
        assert "".join(pieces(tokenizer, ids, stop=stop, include_stop_str_in_output=True)) == before + stop
        shown = before if stop.startswith("<|im_end|>") else before.replace("one", "one<|im_end|>")
        assert "".join(pieces(tokenizer, ids, stop=stop, skip_special_tokens=False)) == shown
    # without a match they stay left out, whole or in part
    for stop in ("<|im_end|>x", "\n<|im_start|>x", "m_end|>\n<|im_start|>user tx"):
        assert "".join(pieces(tokenizer, ids, stop=stop)) == "one\nuser two"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "one"),
        ({"skip_special_tokens": False}, "one"),
        ({"include_stop_str_in_output": True}, "one<|im_end|>"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "one<|im_end|>"),
        ({"include_stop_str_in_output": True, "stop": ()}, "one"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False, "stop": ()}, "one<|im_end|>"),
    ],
)
def test_the_token_that_ended_an_answer(tokenizer: Tokenizer, params: dict[str, Any], text: str) -> None:
    """In the text only where the request wants to see what ended it, and then as the request wants special tokens."""
    sampling = SamplingParams(**{"stop": "<|im_end|>", **params})
    answer = AnswerText(tokenizer, sampling)
    ids = tokenizer.encode_plain("one")
    assert "".join([*map(answer.add, ids), answer.end(tokenizer.token_id("<|im_end|>"))]) == text


def test_stop_texts_that_are_tokens_are_stop_tokens(tokenizer: Tokenizer) -> None:
    end, video = tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<video>")
    sampling = SamplingParams(stop=("<|im_end|>", "one", "<video>"), stop_token_ids=[3])
    assert with_stop_tokens(sampling, tokenizer, tokenizer.num_tokens).stop_token_ids == (3, end, video)
    assert with_stop_tokens(sampling, tokenizer, video).stop_token_ids == (3, end)  # beyond the model's vocabulary


def test_stop_texts_wait_for_the_minimum(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("a. b. c. d.")
    assert "".join(pieces(tokenizer, ids, stop=".", min_tokens=len(ids) - 1)).count(".") >= 2
