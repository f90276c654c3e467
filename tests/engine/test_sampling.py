"""Draws follow the distribution that the parameters ask for, and each request's draws are its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from vlserve.config import SamplingParams
from vlserve.engine.sampling import Sampler
from vlserve.engine.sequence import Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def sequence(id: int = 0, prompt: tuple[int, ...] = (0,), answer: tuple[int, ...] = (), **params: Any) -> Sequence:
    s = Sequence(id=id, token_ids=list(prompt), media=[], sampling=SamplingParams(**params), max_tokens=5)
    s.token_ids += answer
    return s


def pick(logits: torch.Tensor, s: Sequence, sampler: Sampler | None = None) -> int:
    return (sampler or Sampler(frozenset([4]))).sample(logits[None].clone(), [s]).read()[0].token_id


def frequencies(number: int = 4000, **params: Any) -> dict[int, float]:
    sampler = Sampler(frozenset())
    counts = Counter(pick(LOGITS, sequence(seed=i, **params), sampler) for i in range(number))
    return {token: n / number for token, n in counts.items()}


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_draws_follow_the_softmax(temperature: float) -> None:
    want = (LOGITS / temperature).softmax(0)
    got = frequencies(temperature=temperature)
    for token, p in enumerate(want.tolist()):
        assert abs(got.get(token, 0) - p) < 0.03


def test_filters_keep_what_they_say() -> None:
    assert set(frequencies(300, temperature=1.0, top_k=2)) == {4, 0}
    probabilities = LOGITS.softmax(0)
    assert set(frequencies(300, temperature=1.0, top_p=float(probabilities[4]) + 0.01)) == {4, 0}
    assert set(frequencies(300, temperature=1.0, top_p=1e-6)) == {4}
    assert set(frequencies(300, temperature=2.0, top_p=0)) == {4}, "the likeliest"
    assert set(frequencies(300, temperature=2.0, top_p=0.0, min_p=0.1, top_k=3)) == {4}
    assert frequencies(300, temperature=1.0, top_k=-1) == frequencies(300, temperature=1.0, top_k=0)
    assert set(frequencies(300, temperature=1.0, min_p=0.3)) == {4, 0}  # e^-1 is 0.37 of the best, e^-2 is 0.14


def test_a_top_p_of_nothing_needs_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("vlserve.engine.sampling.draw_tokens", lambda logits, tokens, draws: drawn.extend(draws))
    assert pick(LOGITS, sequence(temperature=2.0, top_p=0.0, seed=1)) == 4 and not drawn
    assert pick(LOGITS, sequence(temperature=2.0, top_p=0.1, seed=1)) == 4 and len(drawn) == 1


def test_penalties_bias_and_minimum_are_applied() -> None:
    assert pick(LOGITS, sequence()) == 4
    assert pick(LOGITS, sequence(logit_bias={2: 50.0})) == 2
    assert pick(LOGITS, sequence(min_tokens=1)) == 0, "4 ends the answer, so it may not come yet"
    assert pick(LOGITS, sequence(answer=(4,), presence_penalty=1.5)) == 0
    assert pick(LOGITS, sequence(answer=(4, 4, 4), frequency_penalty=0.5)) == 0
    assert pick(LOGITS, sequence(prompt=(4,), presence_penalty=1.5)) == 4, "the prompt does not count for presence"
    assert pick(LOGITS, sequence(prompt=(4,), repetition_penalty=2.0)) == 0, "for repetition it does"
    negative = torch.tensor([-1.0, -1.1])
    assert pick(negative, sequence(prompt=(0,), repetition_penalty=1.5)) == 1


def test_a_minimum_without_end_tokens_bans_nothing() -> None:
    assert pick(LOGITS, sequence(min_tokens=3), Sampler(frozenset())) == 4


def test_a_seed_gives_the_same_draws_in_any_company() -> None:
    def draws(with_others: bool) -> list[int]:
        sampler, s = Sampler(frozenset()), sequence(id=1, temperature=1.0, seed=5)
        others = [sequence(id=2, temperature=1.0), sequence(id=3)] if with_others else []
        rows = LOGITS.repeat(1 + len(others), 1)
        for _ in range(40):
            s.token_ids.append(sampler.sample(rows, [s, *others]).read()[0].token_id)
        return s.token_ids[1:]

    assert draws(False) == draws(True)
    assert len(set(draws(False))) > 1


def test_without_a_seed_each_draw_has_its_own() -> None:
    s = sequence(temperature=1.0)
    assert len({pick(torch.zeros(1000), s) for _ in range(20)}) > 10


def test_logprobs_are_the_models_own() -> None:
    s = sequence(temperature=0.7, logprobs=2, logit_bias={1: 100.0}, seed=3)
    (result,) = Sampler(frozenset()).sample(LOGITS[None], [s]).read()
    want = LOGITS.log_softmax(0)
    assert result.token_id == 1 and result.logprob is not None
    assert result.logprob.logprob == pytest.approx(float(want[1]))
    assert [id for id, _ in result.logprob.top] == [4, 0]


def test_rows_drawn_together_are_those_drawn_alone() -> None:
    asked: list[dict[str, Any]] = [
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 900, "top_p": 0.5, "min_p": 0.001},
    ]
    rows, sampler = 3 * torch.randn(len(asked), 700), Sampler(frozenset())
    for number in range(20):
        sequences = [sequence(id=i, seed=i, answer=(0,) * number, **params) for i, params in enumerate(asked)]
        together = [s.token_id for s in sampler.sample(rows, sequences).read()]
        assert together == [pick(row, s) for row, s in zip(rows, sequences, strict=True)]


def test_logprobs_of_several_rows() -> None:
    rows = torch.randn(4, 15)
    sequences = [sequence(id=i, logprobs=number) for i, number in enumerate((3, None, 0, 20))]
    for row, s, result in zip(rows.log_softmax(-1), sequences, Sampler(frozenset()).sample(rows, sequences).read(), strict=True):
        if s.sampling.logprobs is None:
            assert result.logprob is None
            continue
        assert result.logprob is not None and result.logprob.logprob == float(row[result.token_id])
        best = row.argsort(descending=True)[: s.sampling.logprobs].tolist()
        assert result.logprob.top == [(id, float(row[id])) for id in best]
