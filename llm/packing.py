"""Checkpoint layouts of 4-bit weights: from one code a byte to eight in an int32.

Shapes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an int32 holds column AWQ_ORDER[i] of eight


def pack_awq(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] to AutoAWQ's gemm form; ValueError unless N is a multiple of 8."""
    if codes.shape[0] % 8:
        raise ValueError(f"{codes.shape[0]} outputs are no multiple of 8, which AutoAWQ's gemm form packs together")
    return {
        "qweight": _pack(codes.T, AWQ_ORDER),
        "qzeros": _pack(zeros.T, AWQ_ORDER),
        "scales": scales.T.to(torch.float16).contiguous(),
    }


def pack_compressed(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `pack_awq` to compressed-tensors' pack-quantized form; raises ValueError unless N and K are multiples of 8."""
    if codes.shape[0] % 8 or codes.shape[1] % 8:
        raise ValueError(f"a weight of {list(codes.shape)} has a side that is no multiple of 8")
    order = tuple(range(8))
    return {
        "weight_packed": _pack(codes, order),
        "weight_scale": scales.contiguous(),
        "weight_zero_point": _pack(zeros.T, order).T.contiguous(),
        "weight_shape": torch.tensor(codes.shape),
    }


def _pack(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[R, C] of 0..15 -> int32 [R, C / 8]; nibble i, from the lowest, is column order[i] of its eight."""
    eights = values.unflatten(1, (-1, 8)).to(torch.int64)
    packed = sum(eights[:, :, column] << 4 * nibble for nibble, column in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
