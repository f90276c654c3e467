"""Packing and unpacking of checkpoint layouts agree, to the bit, with a reference written apart from them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch

from tests.llm import format_reference as reference
from vlserve.llm.int4_packing import pack_awq, pack_compressed, pack_gptq, unpack_awq, unpack_compressed, unpack_gptq

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors = dict[str, torch.Tensor]

SHAPES = [
    pytest.param((outputs, inputs, group), id=f"{outputs}x{inputs} by {group}")
    for outputs, inputs in product((8, 24, 56), (32, 96, 160, 896))
    for group in sorted({32, 64, 128, inputs})
    if inputs % group == 0
]
GEMV_SHAPES = [shape for shape in SHAPES if shape.values[0][2] >= 128 or shape.values[0][2] in (32, 64)]


def tensors_of(arrays: Mapping[str, reference.Array]) -> Tensors:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def layer_of(arrays: reference.Layer) -> Layer:
    codes, scales, zeros = (torch.from_numpy(array.copy()) for array in arrays)
    return codes, scales, zeros


def assert_layer(got: Layer, want: reference.Layer) -> None:
    for name, left, right in zip(("codes", "scales", "zeros"), got, layer_of(want), strict=True):
        assert left.dtype == right.dtype, f"{name} are {left.dtype}, not {right.dtype}"
        assert left.shape == right.shape and torch.equal(left, right), name


def assert_tensors(got: Mapping[str, torch.Tensor], want: Mapping[str, reference.Array]) -> None:
    assert got.keys() == want.keys()
    for name, right in tensors_of(want).items():
        assert got[name].dtype == right.dtype, f"{name} is {got[name].dtype}, not {right.dtype}"
        assert got[name].is_contiguous() and got[name].shape == right.shape and torch.equal(got[name], right), name


@pytest.mark.parametrize("shape", SHAPES)
def test_awq_gemm(shape: tuple[int, int, int]) -> None:
    layer = reference.random_layer(*shape)
    tensors = reference.pack_awq_gemm(*layer)
    assert_layer(unpack_awq(**tensors_of(tensors)), layer)
    assert_tensors(pack_awq(*layer_of(layer)), tensors)


@pytest.mark.parametrize("shape", GEMV_SHAPES)
def test_awq_gemv(shape: tuple[int, int, int]) -> None:
    """Only what stands in the columns filled up tells 7 groups of 128 from one of 896."""
    layer = reference.random_layer(*shape)
    assert_layer(unpack_awq(**tensors_of(reference.pack_awq_gemv(*layer)), version="gemv"), layer)


@pytest.mark.parametrize("shape", SHAPES)
def test_gptq(shape: tuple[int, int, int]) -> None:
    """Without a word of the version, zero points of all kinds are those of version 1."""
    layer = reference.random_layer(*shape, lowest_zero=1)
    tensors = reference.pack_gptq(*layer)
    assert_layer(unpack_gptq(**tensors_of(tensors)), layer)
    assert_tensors(pack_gptq(*layer_of(layer)), tensors)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gptq_symmetric(shape: tuple[int, int, int], version: int) -> None:
    """Zero points of 8 are stored as 7 by version 1 and as 8 by version 2, whichever the configuration names."""
    codes, scales, zeros = reference.random_layer(*shape)
    zeros = np.full_like(zeros, 8)
    tensors = reference.pack_gptq(codes, scales, zeros, version=version)
    assert_layer(unpack_gptq(**tensors_of(tensors)), (codes, scales, zeros))


@pytest.mark.parametrize("shape", SHAPES)
def test_gptq_in_activation_order(shape: tuple[int, int, int]) -> None:
    """Inputs come sorted by group, those of one group in the order of the file, so that a group is a run of columns."""
    codes, scales, zeros = reference.random_layer(*shape, lowest_zero=1)
    g_idx = np.random.RandomState(3).permutation(np.arange(shape[1]) // shape[2]).astype(np.int32)
    tensors = reference.pack_gptq(codes, scales, zeros, g_idx)
    sorted_codes, order = reference.grouped(codes, g_idx)
    got = unpack_gptq(**tensors_of(tensors))
    assert_layer(got, (sorted_codes, scales, zeros))
    weights = reference.dequantize(got[0].numpy(), got[1].numpy(), got[2].numpy())
    assert np.array_equal(weights, reference.dequantize(codes, scales, zeros, g_idx)[:, order])


@pytest.mark.parametrize("shape", SHAPES)
def test_compressed(shape: tuple[int, int, int]) -> None:
    layer = reference.random_layer(*shape)
    tensors = reference.pack_compressed(*layer)
    read = tensors_of(tensors)
    got = unpack_compressed(read["weight_packed"], read["weight_scale"], read["weight_zero_point"], shape[:2])
    assert_layer(got, layer)
    assert_tensors(pack_compressed(*layer_of(layer)), tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_symmetric(shape: tuple[int, int, int]) -> None:
    codes, scales, zeros = reference.random_layer(*shape)
    zeros = np.full_like(zeros, 8)
    read = tensors_of(reference.pack_compressed(codes, scales, None))
    got = unpack_compressed(read["weight_packed"], read["weight_scale"], None, shape[:2])
    assert_layer(got, (codes, scales, zeros))


@pytest.mark.parametrize("shape", [(20, 36, 12), (12, 40, 40), (9, 35, 35)], ids=str)
def test_compressed_with_words_part_empty(shape: tuple[int, int, int]) -> None:
    """Neither outputs nor inputs need be multiples of eight, for weight_shape says how many there are."""
    layer = reference.random_layer(*shape)
    tensors = reference.pack_compressed(*layer)
    read = tensors_of(tensors)
    got = unpack_compressed(read["weight_packed"], read["weight_scale"], read["weight_zero_point"], shape[:2])
    assert_layer(got, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_type(dtype: torch.dtype) -> None:
    codes, scales, zeros = layer_of(reference.random_layer(24, 96, 32, lowest_zero=1))
    scales = scales.to(dtype)
    read = pack_compressed(codes, scales, zeros)
    for got in (
        unpack_awq(**pack_awq(codes, scales, zeros)),
        unpack_gptq(**pack_gptq(codes, scales, zeros)),
        unpack_compressed(read["weight_packed"], read["weight_scale"], read["weight_zero_point"], (24, 96)),
    ):
        assert got[1].dtype == dtype and torch.equal(got[1], scales)
        assert torch.equal(got[0], codes) and torch.equal(got[2], zeros)
