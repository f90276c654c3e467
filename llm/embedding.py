"""The token embedding and the language model's head, split by vocabulary.

Shapes: T tokens, C hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.kernels.head import head_matmul, int8_matmul
from vlserve.kernels.head.reference import quantise_rows
from vlserve.llm.formats import Slot
from vlserve.llm.tensor_parallel import Split


class Int8Rows(nn.Module):
    """The rows of a table in 8 bits, to be multiplied with."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        codes, scales = quantise_rows(weight)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, C] -> [R, this rank's rows]."""
        return int8_matmul(x, self.codes, self.scales)


class VocabParallel(nn.Module):
    """This rank's rows of a [V, C] table; serves as embedding, as head, or as both where they are tied."""

    def __init__(self, vocab_size: int, hidden_size: int, split: Split) -> None:
        super().__init__()
        self.vocab_size, self._group = vocab_size, split.group
        self.span = split.padded(vocab_size)
        self.weight = nn.Parameter(torch.empty(self.span.size, hidden_size), requires_grad=False)
        self.int8_rows: Int8Rows | None = None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] int64 -> [T, C]: each row comes from the rank that has it, the others add zeros."""
        if self._group.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.span.start
        elsewhere = (local < 0) | (local >= self.span.size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self._group.all_reduce(rows, "embedding")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [R, C] -> float32 logits [R, V] on rank 0, None on the others."""
        logits = head_matmul(hidden, self.weight) if self.int8_rows is None else self.int8_rows(hidden)
        gathered = self._group.gather(logits, "logits")
        return None if gathered is None else gathered[:, : self.vocab_size].float()

    def quantise_head(self, *, embeds: bool) -> None:
        """Once the weights are there: `logits` multiplies by 8-bit rows. Those given stay only where the table also `embeds`."""
        self.int8_rows = Int8Rows(self.weight)
        if not embeds:
            self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)

    def target(self) -> Slot:
        return Slot(self.weight.data, (self.vocab_size, self.weight.shape[1]), {0: self.span})
