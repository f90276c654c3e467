"""The dense feed-forward half of a decoder layer: gate and up, SiLU, down. Shapes: T tokens, C hidden size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlserve.kernels.gate import silu_mul
from vlserve.llm.config import DecoderConfig
from vlserve.llm.layer import FeedForward
from vlserve.llm.linear import ColumnParallelLinear, Linear, RowParallelLinear
from vlserve.llm.tensor_parallel import Split


class DenseMLP(FeedForward):
    """This rank's part of the width; the down projection's sum brings every rank the whole result."""

    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        hidden, width, span = config.hidden_size, config.intermediate_size, split.padded(config.intermediate_size)
        outputs = {"gate_proj": (span, width), "up_proj": (span, width)}
        self.gate_up_proj = ColumnParallelLinear(hidden, outputs, bias=config.mlp_bias)
        self.down_proj = RowParallelLinear("down_proj", span, width, hidden, bias=config.mlp_bias, group=split.group)

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.gate_up_proj.format.empty_sums(x)

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        gate_up = self.gate_up_proj(x, sums)
        sums = self.down_proj.format.empty_sums(gate_up)
        return self.down_proj(silu_mul(gate_up, sums), sums)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        yield "mlp.", self.gate_up_proj
        yield "mlp.", self.down_proj
