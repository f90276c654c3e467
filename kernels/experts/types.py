"""Weights of experts as they are stored, and which rows go to which of them. Letters, and what the numbers mean: reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlserve.kernels.int4.cpu import PackedInt4

MXFP4_GROUP = 32  # inputs that share a scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseExperts:
    """weight [E, N, K], of the compute type."""

    weight: torch.Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outputs, inputs = self.weight.shape
        return experts, outputs, inputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Experts:
    """codes [E, N, K/2] uint8, scales [E, N, G] of the compute type, zeros [E, N, G] uint8: each expert's as `int4` has them."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outputs, pairs = self.codes.shape
        return experts, outputs, 2 * pairs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fp8Experts:
    """codes [E, N, K] float8_e4m3fn, none of them NaN; scales [E, N, B] float32.

    block: inputs that share a scale; None where a row has one scale, and B is 1. offset: inputs of the first block that this
    rank does not have, so that input k has scale (k + offset) // block.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: int | None = None
    offset: int = 0

    @property
    def size(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outputs, inputs = self.codes.shape
        return experts, outputs, inputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mxfp4Experts:
    """codes [E, N, K/32, 16] uint8, E2M1, the even input in the lower half; scales [E, N, K/32] uint8, E8M0, none of them NaN."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, outputs, groups = self.scales.shape
        return experts, outputs, MXFP4_GROUP * groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedExperts:
    """4-bit weights as torch's operator on the CPU takes them, one of `int4.cpu.pack_for_cpu` an expert; all of one shape."""

    packed: tuple[PackedInt4, ...]
    outputs: int
    inputs: int

    @property
    def size(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return len(self.packed), self.outputs, self.inputs


ExpertWeights = DenseExperts | Int4Experts | Fp8Experts | Mxfp4Experts | PackedExperts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """The programs of a product on a GPU: a block is up to `rows` choices of one expert.

    order: [T * S] int32, all choices, those of an expert one after the other, as they came. blocks: [3, M] int32, of each block
    its expert, its first place in `order` and the place after its last; expert E for choices of other ranks' experts, -1 for a
    block that is not needed. M follows from T, S and E alone.
    """

    order: torch.Tensor
    blocks: torch.Tensor
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    """Which choices go to which of this rank's experts; made by `routes`, once a layer.

    experts: [T, S] int32, from 0, and E where the expert is another rank's. num_experts: E. groups: (expert, its choices [n]
    int64) of all that have some, where torch's operators compute; blocks: where Triton's kernels do.
    """

    experts: torch.Tensor
    num_experts: int
    groups: tuple[tuple[int, torch.Tensor], ...] = ()
    blocks: Blocks | None = None

    @property
    def num_choices(self) -> int:
        """T * S."""
        return self.experts.numel()

    def per_row(self, x: torch.Tensor) -> int:
        """Choices that a row of x [T, K] or [T * S, K] has; raises ValueError when it is neither."""
        tokens, each = self.experts.shape
        if x.ndim == 2 and len(x) in (tokens, tokens * each):
            return tokens * each // len(x)
        raise ValueError(f"x is {tuple(x.shape)}; expected [{tokens}, K] or [{tokens * each}, K]: a row a token, or a choice")
