"""Draws equal their definition, which sorts: by torch, and by Triton's kernels, interpreted where there is no GPU."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.noise import log_noise_of, log_noise_of_all, philox
from vlserve.kernels.sampling.reference import draw_ref, kept_ref
from vlserve.kernels.sampling.types import Draw

pytest.importorskip("triton")
from vlserve.kernels.sampling import triton as sampling_triton
from vlserve.kernels.sampling import triton_filter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3, "min_p": 0.02},
    {"top_k": 1},
    {"top_k": 3},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"temperature": 1e-5, "top_p": 0.5},
    {"temperature": 3.0, "top_p": 0.999},
    {"top_k": 40, "top_p": 0.5, "min_p": 0.01},
    {"top_k": 10**6, "top_p": 0.3},
    {"temperature": 50.0, "top_k": 33, "min_p": 1.0},
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves out is NaN, or no id."""

    def full(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else -(10**6), dtype=dtype, device=device)

    monkeypatch.setattr(sampling_triton.torch, "empty", full)


def kept(rows: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """[D, V] bool: what the kernels keep by top-k and top-p."""
    settings, number = sampling_triton.upload_settings(draws, rows.shape[1], torch.device(DEVICE))
    assert number == len(draws)
    there = rows.to(DEVICE)
    least, last = triton_filter.top_filter(there, there.argmax(-1), settings, number)
    of_draws, ids, least, last = (
        rows[[d.row for d in draws]],
        torch.arange(rows.shape[1]),
        least.cpu()[:, None],
        last.cpu()[:, None],
    )
    return (of_draws > least) | (of_draws == least) & (ids <= last)


def same_but_at_the_bound(got: torch.Tensor, row: torch.Tensor, draw: Draw) -> None:
    """`got` [V] bool is what the definition keeps, but that it may have one more or less where the sum reaches top-p."""
    want = kept_ref(row, replace(draw, min_p=0.0))
    differing = int((got != want).sum())
    assert differing <= (draw.top_p < 1), draw
    if differing:
        share = (row.double() / draw.temperature).softmax(0).masked_fill(~kept_ref(row, replace(draw, top_p=1.0, min_p=0.0)), 0)
        assert abs(float(share[got & want].sum() / share.sum()) - draw.top_p) < 1e-5, draw


def logits_of(kind: str, rows: int, vocab: int) -> torch.Tensor:
    x = 3 * torch.randn(rows, vocab)
    if kind == "ties":
        return x.round()
    if kind == "banned":
        return x.masked_fill(torch.rand(rows, vocab) < 0.9, -math.inf).index_fill(1, torch.tensor([vocab - 1]), -40.0)
    if kind == "equal":
        return torch.full((rows, vocab), -0.0).index_fill(1, torch.arange(0, vocab, 2), 0.0)
    return x.bfloat16().float() if kind == "as a head's" else x


@pytest.mark.parametrize("kind", ("any", "as a head's", "ties", "banned", "equal"))
@pytest.mark.parametrize("vocab", (1, 33, 2049))
def test_draws_equal_the_definition(vocab: int, kind: str, poisoned: None) -> None:
    rows = logits_of(kind, len(ASKED), vocab)
    draws = [Draw(row=i, seed=7 * i - 3, number=i, **{"temperature": 1.0} | params) for i, params in enumerate(ASKED)]
    likeliest = rows.argmax(-1)
    want = draw_ref(rows, likeliest, draws)
    tokens, there = likeliest.clone(), likeliest.to(DEVICE, copy=True)
    draw_tokens(rows, tokens, draws)
    sampling_triton.draw_tokens_triton(rows.to(DEVICE), there, draws)
    assert tokens.tolist() == there.tolist() == want.tolist()
    cut = [d for d in draws if d.cuts(vocab)]
    for d, got in zip(cut, kept(rows, cut) if cut else (), strict=True):
        same_but_at_the_bound(got, rows[d.row], d)


@pytest.mark.parametrize("params", ({"top_p": 0.2}, {"top_p": 0.8}, {"top_p": 0.5, "temperature": 0.1}, {"top_k": 9000}))
def test_a_large_vocabulary_equals_the_definition_on_a_cpu(params: dict[str, Any]) -> None:
    """More of it stays than is looked through at first, and at second."""
    rows = torch.randn(5, 20_000)
    rows[1] = 0
    draws = [Draw(row=i, seed=i, number=2, **{"temperature": 1.0} | params) for i in range(5)]
    likeliest = rows.argmax(-1)
    tokens = likeliest.clone()
    draw_tokens(rows, tokens, draws)
    assert torch.equal(tokens, draw_ref(rows, likeliest, draws))


def test_a_draw_does_not_depend_on_its_company() -> None:
    """Some rows only, in any order, rows apart in memory."""
    rows = torch.randn(4, 2 * 700)[:, :700]
    draws = [
        Draw(row=i, temperature=2.0, seed=5 * i, number=i, **params)
        for i, params in ((3, {}), (0, {"top_k": 9}), (1, {"top_p": 0.7}))
    ]
    for draw_them in (draw_tokens, lambda *given: sampling_triton.draw_tokens_triton(given[0].to(DEVICE), *given[1:])):
        together, alone = (rows.argmax(-1).to(DEVICE if draw_them is not draw_tokens else "cpu") for _ in range(2))
        before = together.tolist()
        draw_them(rows, together, draws)
        for draw in reversed(draws):
            draw_them(rows, alone, [draw])
        assert together.tolist() == alone.tolist()
        assert together[2] == before[2], "nobody drew there"


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of the interpreter
def test_nothing_that_is_no_number_gives_no_token() -> None:
    rows = torch.randn(3, 50)
    rows[0, 7], rows[1], rows[2, 3] = math.nan, -math.inf, math.inf
    for params in ({}, {"top_k": 5}, {"top_p": 0.5}):
        draws = [Draw(row=i, temperature=1.0, seed=0, number=0, **params) for i in range(3)]
        tokens = rows.argmax(-1)
        there = tokens.to(DEVICE, copy=True)
        draw_tokens(rows, tokens, draws)
        sampling_triton.draw_tokens_triton(rows.to(DEVICE), there, draws)
        assert all(0 <= id < 50 for id in tokens.tolist() + there.tolist())


def test_a_gpu_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(sys.modules["vlserve.kernels.sampling"], "runs_triton", lambda x: True)
    monkeypatch.setattr(sampling_triton, "draw_tokens_triton", lambda *given: launched.append(given))
    given = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), [Draw(row=1, temperature=1.0, seed=0, number=0)]
    draw_tokens(*given)
    draw_tokens(*given[:2], [])
    assert launched == [given]


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"logits are \(2, 3\) torch.float32 and tokens \(3,\)"):
        draw_tokens(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), [])
    with pytest.raises(ValueError, match=r"logits are \(2, 3\) torch.float16"):
        draw_tokens(torch.zeros(2, 3).half(), torch.zeros(2, dtype=torch.int64), [])


def test_words_are_those_of_the_paper_and_the_noise_is_exponential() -> None:
    words = philox(0, 0, torch.arange(3))
    assert words[0].tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]  # of its authors' known answers, for 7 rounds
    assert len({*words.flatten().tolist(), *philox(1, 0, torch.arange(3)).flatten().tolist()}) == 24
    assert torch.equal(philox(-1, 5, torch.arange(3)), philox(2**64 - 1, 5, torch.arange(3)))
    noise = log_noise_of_all(3, 1, 100_001, torch.device("cpu"))
    ids = torch.tensor([100_000, 3, 77, 2])
    assert torch.equal(log_noise_of(3, 1, ids, 100_001), noise[ids])
    for at in (0.001, 0.1, 1.0, 3.0):
        share = 1 - math.exp(-at)
        assert abs(float((noise < math.log(at)).double().mean()) - share) < 5 * math.sqrt(share * (1 - share) / 100_000)
