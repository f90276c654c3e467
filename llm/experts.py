"""A mixture of experts as the feed-forward half of a layer: a router chooses each token's experts, whose results are added up.

Ranks share each expert's width, or the experts (`Split.expert_parallel`); the sum over ranks brings every rank the whole result
in both cases. Shapes: T tokens, S experts of a token, R experts of the layer, E of this rank, C hidden size, F width of this
rank's part of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.kernels.experts import combine, routes
from vlserve.kernels.gate import clamped_swiglu, silu_mul
from vlserve.llm.config import DecoderConfig, ExpertsConfig
from vlserve.llm.layer import FeedForward
from vlserve.llm.linear import ColumnParallelLinear, Linear, RowParallelLinear
from vlserve.llm.stacked_experts import StackedExperts
from vlserve.llm.tensor_parallel import Span, Split


class Experts(FeedForward):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        assert config.experts is not None, "only layers of the config's `experts.layers` have experts"
        given, hidden = config.experts, config.hidden_size
        self.config, self.split, self.span = given, split, split.experts(given.num_experts)
        span = split.expert_width(given.width, given.unit)
        self.router = nn.Parameter(torch.empty(given.num_experts, hidden), requires_grad=False)
        self.router_bias = nn.Parameter(torch.empty(given.num_experts), requires_grad=False) if given.router_bias else None
        self.gate_up = StackedExperts([_gate_up(given, hidden, span) for _ in range(self.span.size)])
        self.down = StackedExperts([_down(given, hidden, span, split) for _ in range(self.span.size)])

    def empty_sums(self, x: torch.Tensor) -> None:
        """Products of experts take nothing else."""

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        experts, weights = choose(F.linear(x, self.router, self.router_bias), self.config)
        where = routes(experts, self.span.size, self.span.start)
        rows = self.down(self.activate(self.gate_up(x, where)), where)
        return self.split.group.all_reduce(combine(rows, weights), "experts")

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T*S, 2F] -> [T*S, F]."""
        gate = self.config.gate
        return silu_mul(gate_up) if gate is None else clamped_swiglu(gate_up, gate.alpha, gate.limit)

    @property
    def shape(self) -> tuple[object, ...]:
        """Layers that launch the same have the same."""
        weights = (self.gate_up.weights, self.down.weights)
        return tuple((type(held), None if held is None else held.size) for held in weights)

    def launch_all(self, most_tokens: int) -> None:
        """All that steps of up to so many tokens launch, so that it has been compiled; on a GPU with Triton."""
        for part in (self.gate_up, self.down):
            part.launch_all(self.config.top_k, self.router.dtype, most_tokens)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """While the weights come; afterwards there are none."""
        for number, linears in enumerate(zip(self.gate_up.each(), self.down.each(), strict=True), self.span.start):
            for linear in linears:
                yield f"mlp.experts.{number}.", linear

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "mlp.gate.weight", self.router.data
        if self.router_bias is not None:
            yield "mlp.gate.bias", self.router_bias.data

    def is_elsewhere(self, number: int) -> bool:
        """Whether expert `number` of the layer is another rank's."""
        return number < self.config.num_experts and not self.span.start <= number < self.span.stop

    def finish(self) -> None:
        self.gate_up.finish()
        self.down.finish()
        if self.split.group.rank and not self.split.expert_parallel:
            self.down.bias = None  # added once


def choose(logits: torch.Tensor, config: ExpertsConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's logits [T, R] to each token's experts [T, S] int32, the likeliest first, and their weights [T, S] float32."""
    logits = logits.float()
    chosen, experts = logits.topk(config.top_k)
    total = chosen if config.norm_topk_prob else logits
    return experts.int(), (chosen - total.logsumexp(-1, keepdim=True)).exp()


def _gate_up(config: ExpertsConfig, hidden: int, span: Span) -> ColumnParallelLinear:
    outputs = dict.fromkeys(("gate_proj", "up_proj"), (span, config.width))
    return ColumnParallelLinear(hidden, outputs, bias=config.bias)


def _down(config: ExpertsConfig, hidden: int, span: Span, split: Split) -> RowParallelLinear:
    return RowParallelLinear("down_proj", span, config.width, hidden, bias=config.bias, group=split.group)
