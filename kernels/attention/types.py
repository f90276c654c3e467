"""Who attends to what in one step. Letters: reference.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionMetadata:
    """Who attends to what in one step; one object serves every layer. Made by `plan_attention`."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor  # [B, M] int64, padded with a block of the same sequence
    slots: torch.Tensor  # [T] int64, where the new keys and values go
    block_size: int  # slots in a block
    decodes: tuple[DecodeGroup, ...]  # these two for torch's operators
    prefills: tuple[Prefill, ...]
    launches: dict[tuple[int, ...], Any] = field(default_factory=dict)  # for Triton's kernels, by shape; made by the first layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeGroup:
    """Sequences with one query each and contexts of similar length, attended to together."""

    rows: torch.Tensor  # [B'] int64, their places among the T tokens
    blocks: torch.Tensor  # [B' * M'] int64
    context_len: int  # the longest
    mask: torch.Tensor | None  # [B', 1, 1, L] bool, None where all are equally long


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """One sequence with several queries: tokens start..stop of the T."""

    start: int
    stop: int
    blocks: torch.Tensor  # [M'] int64
    context_len: int
    mask: torch.Tensor | None  # [query_len, L] bool, None where nothing came before the queries
