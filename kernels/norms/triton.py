"""Norms on a GPU: a program a row, in float32, rounded once. Shapes: as in reference.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.group_sums.reference import INPUTS, groups_of
from vlserve.kernels.group_sums.triton import store_sums
from vlserve.kernels.with_triton import check_contiguous


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `rms_norm_ref`; rows of x may lie apart."""
    return _launch_rms(x, None, weight, eps, sums)[0]


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_ref`: the norm is that of the rounded sum."""
    return _launch_rms(x, residual, weight, eps, sums)


def _launch_rms(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, sums: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_contiguous(sums=sums)
    width = x.shape[-1]
    rows = _rows(x)
    residual_rows = rows if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    groups = 0 if sums is None else groups_of(sums, rows)
    padded = max(INPUTS if groups else 1, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        _rms_kernel[(len(rows),)](
            *(out, total, rows, residual_rows, weight.contiguous(), sums, rows.stride(0), residual_rows.stride(0), eps),
            WIDTH=width,
            WIDTH_PADDED=padded,
            ADDS=residual is not None,
            GROUPS=groups,
            num_warps=min(16, max(1, padded // 256)),  # eight numbers a thread, which is sixteen bytes, until there are 16 warps
        )
    return out, total


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def _rms_kernel(
    out, total, x, residual, weight, sums, x_stride, residual_stride, eps,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ADDS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS: of a block of 128, with sums of their own; 0: no sums are wanted."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH_PADDED)
    mask = c < WIDTH
    numbers = tl.load(x + row * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        numbers += tl.load(residual + row * residual_stride + c, mask=mask, other=0.0).to(tl.float32)
        rounded = numbers.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + c, rounded, mask=mask)
        numbers = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
    weights = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    normed = (numbers * scale * weights).to(out.dtype.element_ty)
    tl.store(out + row * WIDTH + c, normed, mask=mask)
    if GROUPS:
        block = tl.arange(0, WIDTH_PADDED // 128)
        store_sums(sums, normed, block, tl.cdiv(WIDTH, 128), row, tl.num_programs(0), GROUPS)


def layer_norm_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """As `layer_norm_ref`."""
    return _launch_layer(x, None, None, weight, bias, eps)[0]


def add_scaled_norm_triton(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_scaled_norm_ref`: the norm is that of the rounded sum."""
    return _launch_layer(branch, residual, scale, weight, bias, eps)


def _launch_layer(
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
        _layer_kernel[(out.numel() // width,)](
            *(out, total, *parameters, eps),
            WIDTH=width,
            WIDTH_PADDED=padded,
            ADDS=residual is not None,
            IS_CENTRED=bias is not None,
            num_warps=min(16, max(1, padded // 256)),  # eight numbers a thread, which is sixteen bytes, until there are 16 warps
        )
    return out, total


@triton.jit
def _layer_kernel(
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
