"""One decoder layer's weights in few bits: which scales go from a linear layer into what comes before, and how each is rounded.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from vlserve.llm.config import DecoderConfig
from vlserve.llm.int4_packing import pack_awq, pack_compressed
from vlserve.quantize.activation_stats import Inputs, relative_error
from vlserve.quantize.awq import round_clipped, search_scales
from vlserve.quantize.gptq import round_gptq
from vlserve.quantize.rounding import Grouped, Rounded, round_groups, round_rows

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT, GATE_UP, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
READERS = {"qkv": QKV, "output": OUTPUT, "gate_up": GATE_UP, "down": DOWN}  # who reads the same inputs
LINEARS = (*QKV, *OUTPUT, *GATE_UP, *DOWN)
UNCLIPPED = QKV[:2]  # their product, not their output, is what matters; the paper's own code leaves them too


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How weights are rounded; `scale_dtype` is None where scales are stored in the weight's own type."""

    method: str
    group_size: int
    scale_dtype: torch.dtype | None


@dataclass(slots=True)
class LayerResult:
    """By name within the layer: what became of the linear layers, tensors that scales went into, and each output's error."""

    rounded: dict[str, Rounded] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)  # in their stored types
    errors: dict[str, float] = field(default_factory=dict)
    few_tokens: int = 0  # experts that were given fewer than they need


def quantize_layer(
    stored: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Inputs],
    config: DecoderConfig,
    recipe: Recipe,
    progress: Callable[[], None] = lambda: None,
) -> LayerResult:
    """Round the linear layers that read `inputs`.

    Args:
        stored: the layer's tensors as the checkpoint has them, on the device to compute on.
        inputs: what each of READERS read, finished; divided in place by the scales that are found. A layer with experts has
            those of attention.
        progress: called after each linear layer.

    Raises ValueError naming a tensor that cannot be rounded.
    """
    for reader, given in inputs.items():
        if not given.moments.isfinite().all():
            raise ValueError(f"the inputs of {READERS[reader][0]} hold NaN or infinity on the calibration samples")
    weights = {name: stored[f"{name}.weight"].float() for reader in inputs for name in READERS[reader]}
    result = LayerResult()
    if recipe.method == "awq":
        _Scaling(stored, weights, inputs, config, recipe, result.changed).run()
    for reader in inputs:
        for name in READERS[reader]:
            dtype = recipe.scale_dtype or stored[f"{name}.weight"].dtype
            round_linear(name, weights.pop(name), inputs[reader], recipe, dtype, result)
            progress()
    return result


def round_linear(
    name: str, weight: torch.Tensor, inputs: Inputs, recipe: Recipe, dtype: torch.dtype, result: LayerResult
) -> None:
    """Round one weight, float32 [N, K], into `result`; `dtype`: of its scales. Raises ValueError."""
    rounded = _round(name, weight, inputs, recipe, dtype)
    dense = rounded.dense()
    if not dense.isfinite().all():
        raise ValueError(f"{name}.weight holds NaN, infinity or numbers too large for scales in {dtype}")
    result.rounded[name] = rounded
    result.errors[name] = relative_error(weight, dense, inputs)


def _round(name: str, weight: torch.Tensor, inputs: Inputs, recipe: Recipe, dtype: torch.dtype) -> Rounded:
    if recipe.method == "fp8":
        return round_rows(weight, dtype)
    if recipe.method == "gptq":
        return round_gptq(weight, inputs, recipe.group_size, dtype)
    if recipe.method == "awq" and name not in UNCLIPPED:
        return round_clipped(weight, inputs, recipe.group_size, dtype)
    return round_groups(weight, recipe.group_size, dtype)


class _Scaling:
    """Moves the scales of salient inputs into norms and linear layers before, so that the layer computes what it did."""

    def __init__(
        self,
        stored: Mapping[str, torch.Tensor],
        weights: dict[str, torch.Tensor],
        inputs: Mapping[str, Inputs],
        config: DecoderConfig,
        recipe: Recipe,
        changed: dict[str, torch.Tensor],
    ) -> None:
        self.stored, self.weights, self.inputs, self.changed = stored, weights, inputs, changed
        self.config, self.recipe = config, recipe

    def run(self) -> None:
        heads = (self.config.num_key_value_heads, self.config.num_attention_heads // self.config.num_key_value_heads)
        self._into_norm("input_layernorm", "qkv")
        self._into_linear("self_attn.v_proj", "output", heads)
        if "gate_up" in self.inputs:
            self._into_norm("post_attention_layernorm", "gate_up")
            self._into_linear("mlp.up_proj", "down")
        for name, tensor in self.changed.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} cannot take its scales in {tensor.dtype}")

    def _search(self, reader: str, heads: tuple[int, int] | None = None) -> torch.Tensor:
        names = READERS[reader]
        weight = torch.cat([self.weights[name] for name in names])
        dtype = self.recipe.scale_dtype or self.stored[f"{names[0]}.weight"].dtype
        return search_scales(weight, self.inputs[reader], self.recipe.group_size, dtype, heads)

    def _apply(self, reader: str, scales: torch.Tensor) -> None:
        for name in READERS[reader]:
            self.weights[name] *= scales
        self.inputs[reader].divide(scales)

    def _into_norm(self, norm: str, reader: str) -> None:
        """The norm's weight is rounded to its stored type, and the scales to what that makes of them."""
        scales = self._search(reader)
        key = f"{norm}.weight"
        before = self.stored[key].float()
        after = (before / scales).to(self.stored[key].dtype)
        is_exact = (after != 0) & (before != 0)
        self.changed[key] = after
        self._apply(reader, torch.where(is_exact, before / after.float(), scales))

    def _into_linear(self, before: str, reader: str, heads: tuple[int, int] | None = None) -> None:
        """`before`'s outputs are the reader's inputs, times something; each of a KV head's for several query heads."""
        scales = self._search(reader, heads)
        own = scales if heads is None else scales.unflatten(0, (*heads, -1))[:, 0].flatten()
        self.weights[before] /= own.unsqueeze(1)
        bias = self.stored.get(f"{before}.bias")
        if bias is not None:
            self.changed[f"{before}.bias"] = (bias.float() / own).to(bias.dtype)
        self._apply(reader, scales)


def tensors_of(rounded: Rounded, stored_format: str) -> dict[str, torch.Tensor]:
    """What is written for one linear layer, by the last part of the name."""
    if not isinstance(rounded, Grouped):
        return {"weight": rounded.codes, "weight_scale": rounded.scales}
    pack = pack_awq if stored_format == "awq" else pack_compressed
    return pack(rounded.codes, rounded.scales, rounded.zeros)
