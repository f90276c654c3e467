"""The gates on a GPU, in float32, rounded once. Shapes: as in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.group_sums.reference import groups_of
from vlserve.kernels.group_sums.triton import store_sums
from vlserve.kernels.with_triton import check_contiguous

BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `silu_mul_ref`."""
    check_contiguous(sums=sums)
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    rows = out.view(-1, width)
    groups = 0 if sums is None else groups_of(sums, rows)
    with torch.cuda.device_of(gate_up):
        _kernel[(len(rows), triton.cdiv(width, BLOCK))](out, gate_up, sums, WIDTH=width, BLOCK=BLOCK, GROUPS=groups)
    return out


@triton.jit
def _kernel(out, gate_up, sums, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """GROUPS: of a block of 128, with sums of their own; 0: no sums are wanted."""
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    gated = (gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + f, gated, mask=mask)
    if GROUPS:
        block = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        store_sums(sums, gated, block, tl.cdiv(WIDTH, 128), row, tl.num_programs(0), GROUPS)


def clamped_swiglu_triton(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """As `clamped_swiglu_ref`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (out.numel() // width, triton.cdiv(width, BLOCK))
    with torch.cuda.device_of(gate_up):
        _clamped_kernel[grid](out, gate_up, alpha, limit, WIDTH=width, BLOCK=BLOCK)
    return out


@triton.jit
def _clamped_kernel(out, gate_up, alpha, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    gate, up = tl.minimum(gate, limit), tl.maximum(tl.minimum(up, limit), -limit)
    gated = (up + 1.0) * gate / (1.0 + tl.exp2(gate * alpha * -1.4426950408889634))
    tl.store(out + row * WIDTH + f, gated.to(out.dtype.element_ty), mask=mask)
