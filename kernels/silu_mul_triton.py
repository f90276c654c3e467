"""`silu_mul` on a GPU, in float32, rounded once. Shapes: as in silu_mul.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul_ref`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](out, gate_up, WIDTH=width, BLOCK=BLOCK)
    return out


@triton.jit
def _kernel(out, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + f, mask=mask, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up
    tl.store(out + row * WIDTH + f, gated.to(out.dtype.element_ty), mask=mask)
