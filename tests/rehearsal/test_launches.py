"""Launches are judged by what Triton makes of them: the signature, what a kernel assumes of its tensors, and what is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.signatures import Pointer, compiled, signature_of
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.device import DeviceError
from tests.rehearsal.launches import Launches
from vlserve.kernels.attention import paged_attention, plan_attention
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.head import head_matmul, int8_matmul
from vlserve.kernels.norms import add_rms_norm, add_scaled_norm, layer_norm, rms_norm
from vlserve.kernels.norms import triton as norms_triton
from vlserve.kernels.rotary import rotary_store
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.types import Draw


def test_operations_one_by_one(launches: Launches) -> None:
    def there(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to("cuda", torch.float16)

    x = there(5, 64)
    rms_norm(x, x[0], 1e-6)
    add_rms_norm(x[:, :48], x[:, 16:], x[0, :48], 1e-6)
    layer_norm(x, x[0], x[1], 1e-6)
    add_scaled_norm(x, x, x[0], x[1], x[2], 1e-6)
    silu_mul(x)
    head_matmul(x, there(100, 64))
    int8_matmul(x, torch.ones(100, 64, dtype=torch.int8).to("cuda"), torch.ones(100).to("cuda"))
    qkv = there(5, 8 * 64).unflatten(1, (8, 64))
    caches = torch.zeros(4, 16, 2, 64).to("cuda", torch.float16), torch.zeros(4, 16, 2, 64).to("cuda", torch.float16)
    slots, tables = torch.arange(5).to("cuda"), torch.tensor([[0], [1]]).to("cuda")
    cos = torch.ones(5, 32).to("cuda")
    query = rotary_store(qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], (cos, cos), caches, slots)
    plan = plan_attention(query_lens=(1, 4), context_lens=(3, 4), block_tables=tables, slots=slots, block_size=16)
    paged_attention(query, *caches, plan, 0.125)
    logits = torch.randn(3, 200).to("cuda")
    draw_tokens(logits, logits.argmax(-1), [Draw(row=1, temperature=1.0, top_k=4, seed=3, number=2)])
