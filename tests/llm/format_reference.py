"""How published quantised checkpoints lay out their weights, spelled out in plain numpy as a second opinion on the loader.

A grouped 4-bit layer is `codes` [N, K] of 0..15, `scales` [N, K / G] and `zeros` [N, K / G]: N outputs, K inputs, G inputs to
a group, and w[n, k] = (codes[n, k] - zeros[n, group of k]) * scales[n, group of k]. Each `pack_*` gives the tensors of a layer
under the names of their format, each `unpack_*` takes them apart again. 8-bit floats travel as their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]
Layer = tuple[Array, Array, Array]  # codes, scales, zeros

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies at bits 0, 4, 8 and so on


def pack_words(values: Array, order: tuple[int, ...] = IN_ORDER) -> Array:
    """Rows of 4-bit values, eight to an int32: bits 4i to 4i+3 hold number order[i]. A last word may be part empty."""
    if values.min() < 0 or values.max() > 15:
        raise ValueError(f"4 bits hold 0 to 15, found {values.min()} to {values.max()}")
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // 8)), np.uint32)
    for column in range(columns):
        word, number = divmod(column, 8)
        words[:, word] |= values[:, column].astype(np.uint32) << np.uint32(4 * order.index(number))
    return words.view(np.int32)


def unpack_words(words: Array, columns: int, order: tuple[int, ...] = IN_ORDER) -> Array:
    """The first `columns` values of each row of words."""
    unsigned = np.ascontiguousarray(words, np.int32).view(np.uint32)
    values = np.zeros((len(words), columns), np.uint8)
    for column in range(columns):
        word, number = divmod(column, 8)
        values[:, column] = (unsigned[:, word] >> np.uint32(4 * order.index(number))) & np.uint32(15)
    return values


def transposed(array: Array) -> Array:
    """The transpose, laid out anew as files need it."""
    return np.ascontiguousarray(array.T)


def pack_awq_gemm(codes: Array, scales: Array, zeros: Array) -> Tensors:
    """AutoAWQ, version "gemm": inputs down, outputs across, eight outputs to a word in AWQ's order. N is a multiple of 8."""
    return {
        "qweight": pack_words(codes.T, AWQ_ORDER),  # [K, N / 8]
        "qzeros": pack_words(zeros.T, AWQ_ORDER),  # [K / G, N / 8]
        "scales": transposed(scales),  # [K / G, N]
    }


def unpack_awq_gemm(tensors: Mapping[str, Array]) -> Layer:
    scales = transposed(tensors["scales"])
    codes, zeros = (transposed(unpack_words(tensors[name], len(scales), AWQ_ORDER)) for name in ("qweight", "qzeros"))
    return codes, scales, zeros


def awq_gemv_width(inputs: int, group: int) -> int:
    """Words to a row of zero points. The kernel wants them by 1, 2 or 4 for groups of 128 or more, 64 and 32."""
    if group < 128 and group not in (32, 64):
        raise ValueError(f"AutoAWQ's gemv has groups of 32, 64, or 128 and more inputs, not {group}")
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = -(-(inputs // group) // 8)
    return -(-words // multiple) * multiple


def pack_awq_gemv(codes: Array, scales: Array, zeros: Array) -> Tensors:
    """AutoAWQ, version "gemv": outputs down, inputs across in order, zero points and scales filled up with zeros."""
    outputs, groups = scales.shape
    width = awq_gemv_width(codes.shape[1], codes.shape[1] // groups)
    wide_zeros, wide_scales = np.zeros((outputs, 8 * width), np.uint8), np.zeros((outputs, 8 * width), scales.dtype)
    wide_zeros[:, :groups], wide_scales[:, :groups] = zeros, scales
    # [N, K / 8], [N, width], [N, 8 * width]
    return {"qweight": pack_words(codes), "qzeros": pack_words(wide_zeros), "scales": wide_scales}


def unpack_awq_gemv(tensors: Mapping[str, Array], group: int) -> Layer:
    """The group size must be told: filled up, 7 groups of 128 and one of 896 have the same shapes."""
    inputs = 8 * tensors["qweight"].shape[1]
    groups = inputs // group
    codes, zeros = unpack_words(tensors["qweight"], inputs), unpack_words(tensors["qzeros"], groups)
    return codes, np.ascontiguousarray(tensors["scales"][:, :groups]), zeros


def pack_gptq(codes: Array, scales: Array, zeros: Array, g_idx: Array | None = None, version: int = 1) -> Tensors:
    """GPTQ: eight inputs to a word, down; eight zero points to a word, across.

    `g_idx` names each input's group; with desc_act it is in no order. Version 1, "gptq", stores zero points less one,
    so has none of 0; version 2, "gptq_v2", stores them as they are.
    """
    inputs, groups = codes.shape[1], scales.shape[1]
    if g_idx is None:
        g_idx = np.arange(inputs) // (inputs // groups)
    return {
        "qweight": transposed(pack_words(codes)),  # [K / 8, N]
        "qzeros": pack_words(zeros.T.astype(np.int64) - (version == 1)),  # [K / G, N / 8]
        "scales": transposed(scales),  # [K / G, N]
        "g_idx": g_idx.astype(np.int32),  # [K]
    }


def unpack_gptq(tensors: Mapping[str, Array], version: int = 1) -> tuple[Array, Array, Array, Array]:
    """Codes in the order of the inputs, scales and zero points by group, and each input's group."""
    scales, g_idx = transposed(tensors["scales"]), tensors["g_idx"]
    codes = unpack_words(transposed(tensors["qweight"]), len(g_idx))
    zeros = transposed(unpack_words(tensors["qzeros"], len(scales))) + np.uint8(version == 1)
    return codes, scales, zeros, g_idx


def grouped(codes: Array, g_idx: Array) -> tuple[Array, Array]:
    """Codes with the inputs of a group side by side, groups in order, and which input each column is."""
    order = np.argsort(g_idx, kind="stable")
    return codes[:, order], order


def pack_compressed(codes: Array, scales: Array, zeros: Array | None) -> Tensors:
    """compressed-tensors, "pack-quantized": inputs across, eight to a word; zero points by eight outputs, down.

    The format calls values -8..7 and stores them plus 8. Symmetric layers, those without zero points, have 8 throughout.
    """
    tensors = {
        "weight_packed": pack_words(codes),  # [N, K / 8]
        "weight_scale": scales,  # [N, K / G]
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zeros is not None:
        tensors["weight_zero_point"] = transposed(pack_words(zeros.T))  # [N / 8, K / G]
    return tensors


def unpack_compressed(tensors: Mapping[str, Array]) -> Layer:
    outputs, inputs = (int(size) for size in tensors["weight_shape"])
    scales = tensors["weight_scale"]
    zeros = np.full(scales.shape, 8, np.uint8)
    if "weight_zero_point" in tensors:
        zeros = transposed(unpack_words(transposed(tensors["weight_zero_point"]), outputs))
    return unpack_words(tensors["weight_packed"], inputs), scales, zeros


def dequantize(codes: Array, scales: Array, zeros: Array, g_idx: Array | None = None) -> Array:
    """The weights [N, K] in float64, where the product of a difference of codes and a 16-bit scale is exact."""
    inputs = codes.shape[1]
    if g_idx is None:
        g_idx = np.arange(inputs) // (inputs // scales.shape[1])
    weights = np.zeros(codes.shape, np.float64)
    for column in range(inputs):
        difference = codes[:, column].astype(np.float64) - zeros[:, g_idx[column]]
        weights[:, column] = difference * scales[:, g_idx[column]].astype(np.float64)
    return weights


def decode_e4m3(byte: int) -> float:
    """A float8_e4m3fn: sign, 4 bits of exponent less 7, 3 of fraction. No infinity; all ones is no number."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


E4M3 = np.array([decode_e4m3(byte) for byte in range(256)])


def encode_e4m3(value: float) -> int:
    """The nearest float8_e4m3fn, of two equally near the one with an even last bit; 448 for what is larger."""
    distances = np.abs(E4M3[:127] - abs(value))
    nearest = [int(byte) for byte in np.flatnonzero(distances == distances.min())]
    return min(nearest, key=lambda byte: byte & 1) | (0x80 if np.signbit(value) else 0)


def pack_eight_bit(weight: Array, scales: Array, block: tuple[int, int] | None = None) -> Tensors:
    """8-bit layers: `weight` [N, K] of int8, or of uint8 for the bytes of float8_e4m3fn.

    Scales are one for all [1], one to an output [N, 1], or with `block` one to a tile [ceil(N / rows), ceil(K / columns)].
    DeepSeek and transformers call tiles' scales weight_scale_inv, although weights are multiplied by them too.
    """
    outputs, inputs = weight.shape
    tiles = block and (-(-outputs // block[0]), -(-inputs // block[1]))
    if scales.shape not in ([tiles] if tiles else [(1,), (outputs, 1)]):
        raise ValueError(f"scales of shape {scales.shape} do not fit weights of shape {weight.shape} with block {block}")
    return {"weight": weight, "weight_scale_inv" if block else "weight_scale": scales}


def dequantize_eight_bit(tensors: Mapping[str, Array], block: tuple[int, int] | None = None) -> Array:
    """The weights [N, K] in float64. Tiles at the lower and right edge may be cut short."""
    weight = tensors["weight"]
    values = E4M3[weight] if weight.dtype == np.uint8 else weight.astype(np.float64)
    if block is None:
        return values * tensors["weight_scale"].astype(np.float64)
    scales = tensors["weight_scale_inv"].astype(np.float64)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            values[row, column] *= scales[row // block[0], column // block[1]]
    return values


def random_layer(outputs: int, inputs: int, group: int, *, seed: int = 0, lowest_zero: int = 0) -> Layer:
    """A layer of random codes, scales and zero points, the same for the same arguments with every version of numpy."""
    random = np.random.RandomState(seed)
    codes = random.randint(0, 16, (outputs, inputs)).astype(np.uint8)
    scales = (random.randint(1, 1024, (outputs, inputs // group)) / 4096).astype(np.float16)
    zeros = random.randint(lowest_zero, 16, scales.shape).astype(np.uint8)
    return codes, scales, zeros
