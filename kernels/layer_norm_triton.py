"""`layer_norm` and `add_scaled_norm` on a GPU: a program a row, in float32, rounded once. Shapes: as in layer_norm.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def layer_norm_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """As `layer_norm_ref`."""
    return _launch(x, None, None, weight, bias, eps)[0]


def add_scaled_norm_triton(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_scaled_norm_ref`: the norm is that of the rounded sum."""
    return _launch(branch, residual, scale, weight, bias, eps)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    parameters = [t if t is None else t.contiguous() for t in (x, residual, scale, weight, bias)]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    padded = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _kernel[(out.numel() // width,)](
            *(out, total, *parameters, eps),
            WIDTH=width,
            WIDTH_PADDED=padded,
            ADDS=residual is not None,
            IS_CENTRED=bias is not None,
            num_warps=min(16, max(1, padded // 256)),  # eight numbers a thread, which is sixteen bytes, until there are 16 warps
        )
    return out, total


@triton.jit
def _kernel(
    out, total, x, residual, scale, weight, bias, eps,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ADDS: tl.constexpr, IS_CENTRED: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64) * WIDTH, tl.arange(0, WIDTH_PADDED)
    mask = c < WIDTH
    numbers = tl.load(x + row + c, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        numbers *= tl.load(scale + c, mask=mask, other=0.0).to(tl.float32)
        numbers += tl.load(residual + row + c, mask=mask, other=0.0).to(tl.float32)
        rounded = numbers.to(total.dtype.element_ty)
        tl.store(total + row + c, rounded, mask=mask)
        numbers = rounded.to(tl.float32)
    if IS_CENTRED:
        numbers = tl.where(mask, numbers - tl.sum(numbers, 0) / WIDTH, 0.0)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
    numbers *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    if IS_CENTRED:
        numbers += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + c, numbers.to(out.dtype.element_ty), mask=mask)
