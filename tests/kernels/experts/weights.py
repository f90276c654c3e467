"""Weights of experts for tests, in every form that they are stored in."""

from __future__ import annotations

import torch

from vlserve.kernels.experts import DenseExperts, ExpertWeights, Fp8Experts, Int4Experts, Mxfp4Experts

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def dense(experts: int, outputs: int, inputs: int, dtype: torch.dtype) -> DenseExperts:
    return DenseExperts(weight=torch.randn(experts, outputs, inputs).to(dtype))


def int4(experts: int, outputs: int, inputs: int, group: int, dtype: torch.dtype) -> Int4Experts:
    scales = (torch.rand(experts, outputs, inputs // group) / 10 + 0.01).to(dtype)
    return Int4Experts(
        codes=torch.randint(0, 256, (experts, outputs, inputs // 2), dtype=torch.uint8),
        scales=scales,
        zeros=torch.randint(0, 17, scales.shape, dtype=torch.uint8),
    )


def fp8(experts: int, outputs: int, inputs: int, block: int | None, offset: int = 0) -> Fp8Experts:
    """All codes but NaN's."""
    codes = torch.randint(0, 256, (experts, outputs, inputs), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 1
    blocks = 1 if block is None else -(-(offset + inputs) // block)
    scales = torch.rand(experts, outputs, blocks) / 100 + 0.001
    return Fp8Experts(codes=codes.view(torch.float8_e4m3fn), scales=scales, block=block, offset=offset)


def mxfp4(experts: int, outputs: int, inputs: int, *, lowest: int = 118, highest: int = 128) -> Mxfp4Experts:
    return Mxfp4Experts(
        codes=torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8),
        scales=torch.randint(lowest, highest + 1, (experts, outputs, inputs // 32), dtype=torch.uint8),
    )


def stored(dtype: torch.dtype) -> dict[str, ExpertWeights]:
    """Three experts in every form; sizes that no block divides, groups of every size, and scales of a row."""
    return {
        "dense": dense(3, 20, 40, dtype),
        "dense, 17 inputs": dense(3, 5, 17, dtype),
        "int4, 16": int4(3, 9, 48, 16, dtype),
        "int4, 32": int4(3, 20, 96, 32, dtype),
        "int4, 64": int4(3, 6, 128, 64, dtype),
        "int4, 128": int4(3, 70, 256, 128, dtype),
        "int4, a row": int4(3, 8, 20, 20, dtype),
        "fp8, a row": fp8(3, 20, 40, None),
        "fp8, a row, 17 inputs": fp8(3, 6, 17, None),
        "fp8, 128": fp8(3, 8, 300, 128),
        "fp8, 128, cut": fp8(3, 8, 192, 128, 64),
        "fp8, 128, within one": fp8(3, 8, 16, 128, 40),
        "mxfp4": mxfp4(3, 20, 96),
    }
