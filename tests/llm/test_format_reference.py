"""The reference for checkpoint layouts agrees, to the bit, with the packages that write such checkpoints."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.llm import format_reference as reference
from tests.llm.golden import CASES, Case, byte_pattern, eight_bit_scales, shuffled_groups

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())


def named(*prefixes: str) -> list[str]:
    return [name for name, case in CASES.items() if case.form.startswith(prefixes)]


def assert_written(tensors: Mapping[str, reference.Array], entries: Mapping[str, Any]) -> None:
    """The tensors are those that the package wrote: names, types, shapes and bytes."""
    assert tensors.keys() == entries.keys()
    for name, array in tensors.items():
        entry, data = entries[name], np.ascontiguousarray(array).tobytes()
        dtype = "float8_e4m3fn" if array.dtype == np.uint8 else str(array.dtype)
        assert (dtype, list(array.shape)) == (entry["dtype"], entry["shape"]), name
        if "sha256" in entry:
            assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        else:
            assert np.array_equal(array, read(entry)), name


def read(entry: Mapping[str, Any]) -> reference.Array:
    dtype = np.uint8 if entry["dtype"] == "float8_e4m3fn" else entry["dtype"]
    return np.frombuffer(base64.b64decode(entry["base64"]), dtype).reshape(entry["shape"])


def split(entries: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What was written, and what the package makes of it."""
    return {name: entry for name, entry in entries.items() if name != "dequantized"}, entries.get("dequantized")


def assert_same(got: tuple[reference.Array, ...], want: tuple[reference.Array, ...]) -> None:
    for left, right in zip(got, want, strict=True):
        assert left.dtype == right.dtype and np.array_equal(left, right)


@pytest.mark.parametrize("name", named("awq"))
def test_awq(name: str) -> None:
    case = CASES[name]
    entries, dequantized = split(GOLDEN[name])
    layer = case.layer()
    if case.form == "awq_gemm":
        tensors = reference.pack_awq_gemm(*layer)
        assert_same(reference.unpack_awq_gemm(tensors), layer)
    else:
        tensors = reference.pack_awq_gemv(*layer)
        assert_same(reference.unpack_awq_gemv(tensors, case.group), layer)
    assert_written(tensors, entries)
    if dequantized is not None:
        assert_written({"w": reference.dequantize(*layer).astype(np.float16)}, {"w": dequantized})


@pytest.mark.parametrize("name", [name for name in named("gptq") if name != "gptq with zero points of 0"])
def test_gptq(name: str) -> None:
    case = CASES[name]
    version = int(case.form.split("_")[1])
    entries, dequantized = split(GOLDEN[name])
    layer = case.layer()
    g_idx = shuffled_groups(case.inputs, case.group) if case.form.endswith("desc_act") else None
    tensors = reference.pack_gptq(*layer, g_idx, version)
    assert_written(tensors, entries)
    *unpacked, indices = reference.unpack_gptq(tensors, version)
    assert_same(tuple(unpacked), layer)
    weights = reference.dequantize(*layer, indices)
    assert_written({"w": weights.astype(np.float16)}, {"w": dequantized})
    codes, order = reference.grouped(layer[0], indices)
    assert np.array_equal(reference.dequantize(codes, *layer[1:]), weights[:, order])


def test_gptqmodel_subtracts_from_whole_words() -> None:
    """A zero point of 0 borrows from its neighbours in version 1; adding word by word brings all back, one by one does not."""
    case = CASES["gptq with zero points of 0"]
    codes, scales, zeros = case.layer()
    assert (zeros == 0).any()
    with pytest.raises(ValueError, match="found -1 to 14"):
        reference.pack_gptq(codes, scales, zeros)
    words = read(GOLDEN["gptq with zero points of 0"]["qzeros"]).view(np.uint32)
    whole = (words + np.uint32(0x11111111)).view(np.int32)
    assert np.array_equal(reference.unpack_words(whole, case.outputs).T, zeros)
    singly = reference.unpack_words(words.view(np.int32), case.outputs).T + np.uint8(1)
    assert singly.max() == 16 and not np.array_equal(singly % 16, zeros)


@pytest.mark.parametrize("name", named("compressed_symmetric", "compressed_asymmetric"))
def test_compressed(name: str) -> None:
    case = CASES[name]
    entries, dequantized = split(GOLDEN[name])
    codes, scales, zeros = case.layer()
    symmetric = case.form == "compressed_symmetric"
    if symmetric:
        zeros = np.full_like(zeros, 8)
    tensors = reference.pack_compressed(codes, scales, None if symmetric else zeros)
    assert_written(tensors, entries)
    assert_same(reference.unpack_compressed(tensors), (codes, scales, zeros))
    assert_written({"w": reference.dequantize(codes, scales, zeros).astype(np.float16)}, {"w": dequantized})


@pytest.mark.parametrize("name", named("compressed_fp8", "compressed_int8", "transformers_fp8"))
def test_eight_bit(name: str) -> None:
    case = CASES[name]
    entries, dequantized = split(GOLDEN[name])
    weight = byte_pattern(case)
    if "int8" in case.form:
        weight = weight.view(np.int8)
    block = (case.group, case.group) if case.form.endswith("block") else None
    tensors = reference.pack_eight_bit(weight, eight_bit_scales(case), block)
    weights = reference.dequantize_eight_bit(tensors, block)
    assert_written({"w": weights.astype(np.float32)}, {"w": dequantized})
    if entries:  # compressed-tensors has one name for all scales
        assert_written({name.removesuffix("_inv"): array for name, array in tensors.items()}, entries)


def test_every_8_bit_float_is_torch_s() -> None:
    stored = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(reference.E4M3, stored.double().numpy())
    finite = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    assert [reference.encode_e4m3(reference.E4M3[byte]) for byte in finite] == finite


def test_rounding_to_8_bit_floats_is_torch_s() -> None:
    positive = reference.E4M3[:127]
    between = np.concatenate([(positive[1:] + positive[:-1]) / 2, np.random.RandomState(0).uniform(-448, 448, 500)])
    between = np.concatenate([between, -between, np.random.RandomState(1).uniform(-0.02, 0.02, 500)]).astype(np.float32)
    want = torch.from_numpy(between).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert [reference.encode_e4m3(float(value)) for value in between] == want.tolist()
    assert reference.encode_e4m3(1e6) == 0x7E and reference.encode_e4m3(-1e6) == 0xFE


def test_scales_that_do_not_fit_are_refused() -> None:
    weight = np.zeros((8, 64), np.int8)
    with pytest.raises(ValueError, match=r"scales of shape \(8, 2\) do not fit"):
        reference.pack_eight_bit(weight, np.ones((8, 2), np.float32))
    with pytest.raises(ValueError, match=r"4 bits hold 0 to 15, found 16 to 16"):
        reference.pack_words(np.full((1, 8), 16))
    with pytest.raises(ValueError, match="not 96"):
        reference.pack_awq_gemv(np.zeros((8, 96), np.uint8), np.ones((8, 1), np.float16), np.zeros((8, 1), np.uint8))


def test_the_reference_is_deterministic() -> None:
    """Should numpy ever draw other numbers, this says so rather than every comparison with what was written."""
    codes, scales, zeros = Case("", "", 8, 32, 32).layer()
    assert codes[0, :8].tolist() == [12, 15, 5, 0, 3, 11, 3, 7]
    assert (float(scales[0, 0]), int(zeros[0, 0])) == (526 / 4096, 6)
