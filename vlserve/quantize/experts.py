"""A layer's experts in few bits: each on the tokens that the router gives it.

An expert that got fewer than FEWEST of the calibration tokens is calibrated on more: those of the others that the router scores
highest for it. AWQ's scales go from gate and up into the norm before them, the same for all experts, as powers of two: the router
reads that norm as well and is multiplied by them, and its choices stay exactly what they were.
Shapes: T tokens, R experts, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from vlserve.llm.config import DecoderConfig
from vlserve.quantize.activation_stats import ROWS_AT_ONCE, Inputs
from vlserve.quantize.awq import search_scales
from vlserve.quantize.layer import LayerResult, Recipe, round_linear

FEWEST = 128
NORM, ROUTER = "post_attention_layernorm.weight", "mlp.gate.weight"


def quantize_experts(
    stored: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    config: DecoderConfig,
    recipe: Recipe,
    result: LayerResult,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Round all experts into `result`; arguments and errors as `quantize_layer`. tokens float32 [T, C]: what the router reads."""
    assert config.experts is not None
    if not tokens.isfinite().all():
        raise ValueError("the inputs of mlp.experts hold NaN or infinity on the calibration samples")
    device, number = stored[ROUTER].device, config.experts.num_experts
    router = stored[ROUTER].float()
    logits = torch.cat([(part.to(device) @ router.T).cpu() for part in tokens.split(ROWS_AT_ONCE)])  # [T, R]
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(config.experts.top_k).indices, True)
    scales = torch.ones(tokens.shape[1], device=device)
    if recipe.method == "awq":
        scales = _search_for_all(stored, tokens, number, recipe)
        result.changed[NORM] = (stored[NORM].float() / scales).to(stored[NORM].dtype)
        result.changed[ROUTER] = (router * scales).to(stored[ROUTER].dtype)
        for name in (NORM, ROUTER):
            if not result.changed[name].isfinite().all():
                raise ValueError(f"{name} cannot take its scales in {stored[name].dtype}")
    for expert in range(number):
        rows = tokens[_rows_for(logits[:, expert], chosen[:, expert])].to(device)
        _quantize_expert(f"mlp.experts.{expert}.", stored, rows, scales, recipe, result)
        progress()
    result.few_tokens = int((chosen.sum(0) < FEWEST).sum())


def _rows_for(scores: torch.Tensor, is_chosen: torch.Tensor) -> torch.Tensor:
    """The tokens that an expert is calibrated on, by its scores [T]."""
    missing = min(FEWEST, len(scores)) - int(is_chosen.sum())
    if missing <= 0:
        return is_chosen.nonzero().flatten()
    more = scores.masked_fill(is_chosen, -torch.inf).topk(missing).indices
    return torch.cat([is_chosen.nonzero().flatten(), more])


def _search_for_all(stored: Mapping[str, torch.Tensor], tokens: torch.Tensor, number: int, recipe: Recipe) -> torch.Tensor:
    """Scales [C] of what all experts read, on all tokens."""
    names = [f"mlp.experts.{expert}.{part}_proj.weight" for expert in range(number) for part in ("gate", "up")]
    device = stored[ROUTER].device
    inputs = Inputs(tokens.shape[1], device)
    for part in tokens.split(ROWS_AT_ONCE):
        inputs.add(part.to(device))
    inputs.finish()
    dtype = recipe.scale_dtype or stored[names[0]].dtype
    weight = torch.cat([stored[name] for name in names])
    return search_scales(weight, inputs, recipe.group_size, dtype, powers_of_two=True)


def _quantize_expert(
    prefix: str,
    stored: Mapping[str, torch.Tensor],
    rows: torch.Tensor,
    scales: torch.Tensor,
    recipe: Recipe,
    result: LayerResult,
) -> None:
    gate, up, down = (stored[f"{prefix}{part}_proj.weight"].float() for part in ("gate", "up", "down"))
    outer, inner = Inputs(rows.shape[1], rows.device), Inputs(down.shape[1], rows.device)
    inner.add(F.silu(rows @ gate.T) * (rows @ up.T))
    outer.add(rows / scales)
    for inputs in (outer, inner):
        inputs.finish()
    gate, up = gate * scales, up * scales
    dtype = recipe.scale_dtype or stored[f"{prefix}down_proj.weight"].dtype
    if recipe.method == "awq":
        own = search_scales(down, inner, recipe.group_size, dtype)
        up, down = up / own.unsqueeze(1), down * own
        inner.divide(own)
    for part, weight, inputs in (("gate", gate, outer), ("up", up, outer), ("down", down, inner)):
        round_linear(f"{prefix}{part}_proj", weight, inputs, recipe, dtype, result)
