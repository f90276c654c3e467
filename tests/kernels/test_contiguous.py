"""What a kernel takes for one piece is refused where it is not, by the name of the tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vlserve.kernels.attention import plan_attention
from vlserve.kernels.experts import DenseExperts, Mxfp4Experts, PairedExperts
from vlserve.kernels.experts.pairs import pack_experts_for_gpu
from vlserve.kernels.group_sums.reference import empty_sums
from vlserve.kernels.int4_pairs import pack_for_gpu
from vlserve.kernels.int4_pairs.launch import Launch
from vlserve.kernels.sampling.types import Draw

pytest.importorskip("triton")
from vlserve.kernels.attention.triton import paged_attention_triton
from vlserve.kernels.experts.triton import experts_matmul_triton, routes_triton
from vlserve.kernels.gate.triton import silu_mul_triton
from vlserve.kernels.group_sums.triton import group_sums_triton
from vlserve.kernels.int4_pairs.triton import multiply
from vlserve.kernels.norms.triton import rms_norm_triton
from vlserve.kernels.rotary.triton import rotary_store_triton
from vlserve.kernels.sampling.triton import draw_tokens_triton

X = torch.ones(2, 128, dtype=torch.float16)
SUMS = torch.empty(1, 2, 4)[..., ::2]
CACHE, APART = torch.zeros(3, 16, 2, 64), torch.zeros(3, 16, 2, 128)[..., :64]
SLOTS, TURN = torch.arange(2), torch.ones(2, 32)
HEADS = torch.zeros(2, 2, 64)
DRAW = Draw(row=0, temperature=1.0, seed=1, number=1)


def attention(keys: torch.Tensor, sinks: torch.Tensor | None = None) -> None:
    plan = plan_attention(
        query_lens=(1, 1), context_lens=(1, 1), block_tables=torch.tensor([[0], [1]]), slots=SLOTS, block_size=16
    )
    paged_attention_triton(HEADS, keys, CACHE, plan, 1.0, sinks=sinks)


def rotary(cache: torch.Tensor, slots: torch.Tensor, norm: torch.Tensor) -> None:
    rotary_store_triton(HEADS, HEADS, HEADS, (TURN, TURN), (CACHE, cache), slots, (norm, torch.ones(64)), 1e-6)


def experts(weights: DenseExperts | PairedExperts, bias: torch.Tensor | None = None) -> None:
    experts_matmul_triton(X, weights, routes_triton(torch.zeros(2, 1, dtype=torch.int32), 1, 0), bias)


def paired() -> PairedExperts:
    """With scales of every second row."""
    codes = torch.zeros(1, 64, 4, 16, dtype=torch.uint8)
    packed = pack_experts_for_gpu(Mxfp4Experts(codes=codes, scales=codes[..., 0]))
    assert isinstance(packed, PairedExperts)
    return replace(packed, scales=packed.scales.repeat_interleave(2, -1)[..., ::2])


def product() -> None:
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    packed = pack_for_gpu(codes, torch.ones(64, 1).half(), torch.zeros(64, 1, dtype=torch.uint8))
    assert empty_sums(X, 128, 128).shape == SUMS.shape
    multiply(X, packed, SUMS, Launch(block_t=16, block_n=64, warps=2, stages=3, waves=4), 1)


@pytest.mark.parametrize(
    "name,call",
    [
        ("sums", lambda: silu_mul_triton(torch.ones(2, 256, dtype=torch.float16), SUMS)),
        ("sums", lambda: rms_norm_triton(X, X[0], 1e-6, SUMS)),
        ("out", lambda: group_sums_triton(X, SUMS)),
        ("sums", product),
        ("weights", lambda: experts(DenseExperts(weight=torch.ones(1, 8, 256, dtype=torch.float16)[..., ::2]))),
        ("bias", lambda: experts(DenseExperts(weight=X[None]), torch.ones(1, 4, dtype=torch.float16)[:, ::2])),
        ("scales", lambda: experts(paired())),
        ("keys", lambda: attention(APART)),
        ("sinks", lambda: attention(CACHE, torch.zeros(4)[::2])),
        ("values", lambda: rotary(APART, SLOTS, torch.ones(64))),
        ("slots", lambda: rotary(CACHE, torch.arange(4)[::2], torch.ones(64))),
        ("q_norm", lambda: rotary(CACHE, SLOTS, torch.ones(128)[::2])),
        ("tokens", lambda: draw_tokens_triton(torch.ones(2, 8), torch.zeros(4).long()[::2], [DRAW])),
    ],
)  # fmt: skip
def test_tensors_in_pieces_are_refused(name: str, call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} .* has strides .*; expected it in one piece"):
        call()
