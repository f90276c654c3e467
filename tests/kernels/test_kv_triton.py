"""Triton's kernels of the cache in eight bits equal the definitions: interpreted on the CPU, compiled where there is a GPU.

The interpreter is wrong in bfloat16, which is therefore left to a GPU; that it compiles is checked everywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.test_kernels import TOLERANCE, paged, poisoned, rms_ratio, tensors
from tests.kernels.test_kv_codes import KINDS, awkward
from vlserve.kernels.kv_codes import Blocks, QuantizedBlocks
from vlserve.kernels.paged_attention import AttentionMetadata, paged_attention_ref
from vlserve.kernels.store_kv import store_kv_ref

pytest.importorskip("triton")
kv_triton: Any = pytest.importorskip("vlserve.kernels.kv_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def moved(blocks: Blocks) -> QuantizedBlocks:
    return QuantizedBlocks(*(tensor.to(DEVICE) for tensor in tensors(blocks)))


def moved_metadata(metadata: AttentionMetadata) -> AttentionMetadata:
    return replace(metadata, **{name: getattr(metadata, name).to(DEVICE) for name in ("block_tables", "slots", "lengths")})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (8, 80))
def test_store_kv(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    both = torch.cat((awkward(2, dim, dtype), awkward(2, dim, dtype)), 1)
    both[7, 3, 2] = float("nan")
    key, value = both[:, :2], both[:, 2:]  # cut from one tensor, as a layer's are
    slots = torch.randperm(40)[: len(key)]
    want = [poisoned((8, 5, 2, dim), dtype, kind) for _ in range(2)]
    got = [moved(poisoned((8, 5, 2, dim), dtype, kind)) for _ in range(2)]
    store_kv_ref(key, value, *want, slots)
    kv_triton.store_kv_triton(*(x.to(DEVICE) for x in (key, value)), *got, slots.to(DEVICE))
    for ours, (codes, scales) in zip(got, map(tensors, want), strict=True):
        torch.testing.assert_close(ours.scales.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        is_whole = ~scales.isnan()
        assert torch.equal(ours.codes.cpu()[is_whole], codes[is_whole])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mix,heads,kv_heads,dim,size",
    [
        (((1, 1, 1), (1, 33, 70)), 14, 2, 64, 16),
        (((1, 7, 1, 18), (40, 7, 1, 50)), 6, 2, 80, 5),
        (((3, 1), (34, 32)), 4, 4, 8, 1),
        (((2,), (65,)), 24, 1, 24, 64),
    ],
)
def test_paged_attention(
    mix: tuple[tuple[int, ...], tuple[int, ...]],
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "size": size}
    query, keys, values, metadata, _ = paged(*mix, **shape, dtype=dtype, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5)
    for cache in (keys, values):  # it looks at no slot past a sequence's end
        codes, scales = tensors(cache)
        scales[(codes == 0).all(-1)] = float("nan")
    got = kv_triton.paged_attention_triton(*(query.to(DEVICE), moved(keys), moved(values), moved_metadata(metadata)), dim**-0.5)
    assert got.dtype == dtype and rms_ratio(got.cpu(), want) < TOLERANCE[dtype]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlserve.kernels import kv_triton

def build(kernel, types, constants, capability):
    names = kernel.arg_names
    signature = dict(zip(names, types)) | {name: "constexpr" for name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(types) if type.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

for is_e4m3 in (False, True):
    for capability in (80, 90):
        codes, dtype = "*u8" if is_e4m3 else "*i8", "*bf16"
        caches = [codes, "*i16", codes, "*i16"]
        build(
            kv_triton._store_kernel,
            [dtype, dtype, *caches, "*i64", "i32", "i32", "i32", "i32"],
            dict(HEADS=2, DIM=80, DIM_PADDED=128, LARGEST=448.0, TINY=2.0**-120, IS_E4M3=is_e4m3),
            capability,
        )
        ptx = build(
            kv_triton._attention_kernel,
            [dtype, dtype, *caches, "*i64", "*i64", "fp32", "i32"],
            dict(KV_HEADS=2, GROUP=7, GROUP_PADDED=8, DIM=64, DIM_PADDED=64, BLOCK_SIZE=16, TOKENS=2, TILE=kv_triton.TILE,
                 IS_E4M3=is_e4m3, IS_NATIVE=is_e4m3 and capability >= 89),
            capability,
        )
        assert "mma" in ptx and ("e4m3x2" in ptx) == (is_e4m3 and capability >= 89), (is_e4m3, capability)
"""


def test_they_compile_for_cards_with_and_without_e4m3() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
