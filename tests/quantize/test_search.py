"""The searches: what they promise on inputs that they are made for, and that scales leave a layer's result alone."""

from __future__ import annotations

import torch

from tests.quantize.layers import CONFIG, make_layer
from vlserve.llm.weights import slot_of
from vlserve.quantize.activation_stats import Inputs, relative_error
from vlserve.quantize.awq import round_clipped, search_scales
from vlserve.quantize.gptq import round_gptq
from vlserve.quantize.hidden_states import LayerRunner, watch_inputs
from vlserve.quantize.layer import LayerResult, Recipe, _Scaling, quantize_layer
from vlserve.quantize.rounding import round_groups, round_rows
from vlserve.quantize.sample_conversations import make_conversation

CPU = torch.device("cpu")


def seen(x: torch.Tensor) -> Inputs:
    inputs = Inputs(x.shape[1], CPU)
    for part in x.split(50):
        inputs.add(part)
    inputs.finish()
    return inputs


def test_groups_are_rounded_to_the_nearest_step() -> None:
    weight = torch.randn(16, 64)
    weight[1] = weight[1].abs() + 5  # zero is in no group's range
    weight[2] = 0
    weight[3] *= 1e-6
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = round_groups(weight, 32, dtype)
        steps = rounded.scales.float().repeat_interleave(32, 1)
        # half a step; as much again at the ends, where zero point and scale are rounded
        assert ((rounded.dense() - weight).abs() <= steps * 1.01).all()
        assert rounded.codes.max() <= 15 and rounded.zeros.max() <= 15 and not rounded.dense()[2].any()
    rows = round_rows(weight, torch.bfloat16)
    assert (rows.dense() - weight).abs().max() <= weight.abs().max() / 14 and not rows.dense()[2].any()


def test_the_expected_error_is_that_of_the_outputs() -> None:
    x, weight = torch.randn(200, 64), torch.randn(16, 64)
    rounded = round_groups(weight, 32, torch.float32).dense()
    inputs = seen(x)
    errors = (x @ (rounded - weight).T).square().mean(0)
    assert torch.allclose(inputs.errors(rounded - weight), errors, rtol=1e-4)
    want = (x @ (rounded - weight).T).norm() / (x @ weight.T).norm()
    assert abs(relative_error(weight, rounded, inputs) - float(want)) < 1e-5
    scales = torch.rand(64) + 0.5
    inputs.divide(scales)
    assert torch.allclose(inputs.errors((rounded - weight) * scales), errors, rtol=1e-4)


def test_awq_is_better_than_rounding_where_channels_are_salient() -> None:
    x, weight = torch.randn(400, 128), torch.randn(64, 128)
    x[:, [3, 50, 51, 97]] *= 40
    inputs = seen(x)
    plain = relative_error(weight, round_groups(weight, 32, torch.float16).dense(), inputs)
    scales = search_scales(weight, inputs, 32, torch.float16)
    assert scales[[3, 50, 51, 97]].min() > 3 * scales.median()
    scaled = relative_error(weight, round_groups(weight * scales, 32, torch.float16).dense() / scales, inputs)
    inputs.divide(scales)
    clipped = relative_error(weight * scales, round_clipped(weight * scales, inputs, 32, torch.float16).dense(), inputs)
    assert clipped <= scaled < 0.6 * plain


def test_clipping_helps_where_weights_of_a_group_are_far_out() -> None:
    weight = torch.randn(32, 64)
    weight[:, ::32], weight[:, 1::32] = 9, -9
    x = torch.randn(300, 64)
    x[:, ::32] *= 1e-3  # and hardly matter
    x[:, 1::32] *= 1e-3
    inputs = seen(x)
    errors = [relative_error(weight, found.dense(), inputs) for found in (
        round_groups(weight, 32, torch.float32), round_clipped(weight, inputs, 32, torch.float32))]  # fmt: skip
    assert errors[1] < 0.8 * errors[0]


def test_gptq_is_better_than_rounding_where_inputs_go_together() -> None:
    x = torch.randn(500, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(500, 128)
    x[:, 5] = 0  # never seen
    weight = torch.randn(64, 128)
    inputs = seen(x)
    found = round_gptq(weight, inputs, 32, torch.float16)
    plain = round_groups(weight, 32, torch.float16).dense()
    assert relative_error(weight, found.dense(), inputs) < 0.7 * relative_error(weight, plain, inputs)
    assert (found.dense()[:, 5] - weight[:, 5]).abs().max() < weight.abs().max()
    rows = inputs.errors(found.dense() - weight) <= inputs.errors(plain - weight) * (1 + 1e-5)
    assert rows.all()


def watched() -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.Tensor, LayerRunner, dict[str, Inputs]]:
    layer, x = make_layer(), torch.randn(60, CONFIG.hidden_size)
    x[:, 7] *= 30
    runner = LayerRunner(CONFIG, 60, torch.float32, CPU)
    with watch_inputs(layer, CPU) as inputs:
        runner.run(layer, x, [25, 35])
    return layer, {name: slot_of(target).tensor.clone() for name, target in layer.targets("")}, x, runner, inputs


def test_scales_leave_the_layer_as_it_was() -> None:
    """Two query heads share each KV head, and the layer has biases."""
    layer, stored, x, runner, inputs = watched()
    before = runner.run(layer, x, [25, 35])
    weights = {name.removesuffix(".weight"): tensor.clone() for name, tensor in stored.items() if tensor.ndim == 2}
    recipe, result = Recipe(method="awq", group_size=32, scale_dtype=torch.float16), LayerResult()
    _Scaling(stored, weights, inputs, CONFIG, recipe, result.changed).run()
    slots = {name: slot_of(target).tensor for name, target in layer.targets("")}
    for name, tensor in [*result.changed.items(), *((f"{name}.weight", weight) for name, weight in weights.items())]:
        assert not torch.equal(slots[name], tensor), name
        slots[name].copy_(tensor)
    after = runner.run(layer, x, [25, 35])
    assert torch.allclose(before, after, atol=1e-4), (before - after).abs().max()
    assert {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"} == result.changed.keys()


def test_methods_in_order_of_their_error_on_a_layer() -> None:
    worst = {}
    for method in ("rtn", "awq", "gptq", "fp8"):
        _, stored, _, _, inputs = watched()
        torch.manual_seed(0)
        recipe = Recipe(method=method, group_size=32, scale_dtype=torch.float16)
        errors = quantize_layer(stored, inputs, CONFIG, recipe).errors
        worst[method] = sum(errors.values()) / len(errors)
    assert worst["fp8"] < worst["awq"] < worst["rtn"] and worst["gptq"] < worst["rtn"], worst


def test_generated_conversations_repeat_and_are_right() -> None:
    for index in range(60):
        one, other = (make_conversation(3, index, with_picture=index % 2 == 0) for _ in range(2))
        assert [m["content"] for m in one if isinstance(m["content"], str)] == [
            m["content"] for m in other if isinstance(m["content"], str)
        ]
        assert [message["role"] for message in one] == ["user", "assistant"] * (len(one) // 2)
        if index % 2 == 0:
            pictures = [m["content"][0]["image"] for m in (one[0], other[0])]
            assert pictures[0].tobytes() == pictures[1].tobytes()
    said = [m["content"] for i in range(60) for m in make_conversation(0, i, with_picture=True) if m["role"] == "assistant"]
    assert {"There is 1 shape.", "There are 5 shapes.", "The circle is red.", "The red one is a circle."} <= set(said)
    assert all(any(part in text for text in said) for part in ("Yes, there is a", "No, there is no ", " and an orange "))
