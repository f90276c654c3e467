"""The layers that golden.json tells of, made by formula so that only what others' packages wrote need be kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.llm import format_reference as reference


@dataclass(frozen=True, slots=True)
class Case:
    """A layer of N x K, which package writes it, and in which form. For tiles of 8-bit floats the group is a tile's side."""

    maker: str
    form: str
    outputs: int
    inputs: int
    group: int
    lowest_zero: int = 0

    def layer(self) -> reference.Layer:
        return reference.random_layer(self.outputs, self.inputs, self.group, lowest_zero=self.lowest_zero)


CASES = {
    "autoawq gemm": Case("autoawq", "awq_gemm", 32, 64, 32),
    "autoawq gemm, 7 groups": Case("autoawq", "awq_gemm", 32, 896, 128),
    "gptqmodel's awq gemm": Case("gptqmodel_awq", "awq_gemm", 32, 64, 32),
    "autoawq gemv, groups of 32": Case("autoawq", "awq_gemv", 8, 96, 32),
    "autoawq gemv, groups of 64": Case("autoawq", "awq_gemv", 8, 192, 64),
    "autoawq gemv, 9 groups": Case("autoawq", "awq_gemv", 8, 1152, 128),
    "autoawq gemv, one group": Case("autoawq", "awq_gemv", 8, 160, 160),
    "gptq": Case("gptqmodel", "gptq_1", 32, 64, 32, lowest_zero=1),
    "gptq with zero points of 0": Case("gptqmodel", "gptq_1", 32, 64, 32),
    "gptq_v2": Case("gptqmodel", "gptq_2", 32, 64, 32),
    "gptq, desc_act": Case("gptqmodel", "gptq_1_desc_act", 32, 96, 32, lowest_zero=1),
    "gptq_v2, desc_act": Case("gptqmodel", "gptq_2_desc_act", 32, 96, 32),
    "compressed, symmetric": Case("compressed", "compressed_symmetric", 24, 64, 32),
    "compressed, asymmetric": Case("compressed", "compressed_asymmetric", 24, 64, 32),
    "compressed, asymmetric, words part empty": Case("compressed", "compressed_asymmetric", 20, 36, 12),
    "compressed, symmetric, one group": Case("compressed", "compressed_symmetric", 8, 36, 36),
    "compressed, asymmetric, one group": Case("compressed", "compressed_asymmetric", 12, 40, 40),
    "compressed fp8, tensor": Case("compressed_eight_bit", "compressed_fp8_tensor", 8, 64, 64),
    "compressed fp8, channel": Case("compressed_eight_bit", "compressed_fp8_channel", 8, 64, 64),
    "compressed fp8, block": Case("compressed_eight_bit", "compressed_fp8_block", 130, 140, 128),
    "compressed int8, channel": Case("compressed_eight_bit", "compressed_int8_channel", 8, 64, 64),
    "transformers fp8, block": Case("transformers_fp8", "transformers_fp8_block", 256, 128, 128),
}


def shuffled_groups(inputs: int, group: int) -> reference.Array:
    """The group of each input as activation order leaves it: every group whole, its inputs anywhere."""
    return np.random.RandomState(1).permutation(np.arange(inputs) // group).astype(np.int32)


def byte_pattern(case: Case) -> reference.Array:
    """Every byte that is a number in both 8-bit forms, over and over."""
    numbers = np.array([byte for byte in range(256) if byte not in (0x7F, 0x80, 0xFF)], np.uint8)
    return np.resize(numbers, (case.outputs, case.inputs))


def eight_bit_scales(case: Case) -> reference.Array:
    """Scales in float32, in the shape of the case's strategy."""
    strategy = case.form.rsplit("_", 1)[1]
    shapes = {"tensor": (1,), "channel": (case.outputs, 1)}
    shape = shapes.get(strategy) or (-(-case.outputs // case.group), -(-case.inputs // case.group))
    return np.random.RandomState(2).uniform(0.001, 0.01, shape).astype(np.float32)
