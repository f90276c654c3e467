"""Codes are read exactly by Triton: interpreted or on a GPU, and by the assembly as its manual has it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.caches import DEVICE, KINDS

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels.kv_cache import triton as kv_triton
from vlserve.kernels.kv_cache.triton import numbers_of_pairs, reads_e4m3

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


@triton.jit
def _read_pairs(pairs, even, odd, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr):
    i = tl.arange(0, 65536)
    first, second = numbers_of_pairs(tl.load(pairs + i), even.dtype.element_ty, IS_E4M3, IS_NATIVE)
    tl.store(even + i, first)
    tl.store(odd + i, second)


@pytest.mark.parametrize("is_native", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_codes_is_read_exactly(dtype: torch.dtype, kind: torch.dtype, is_native: bool) -> None:
    is_e4m3 = kind is torch.uint8
    if is_native and (not is_e4m3 or (DEVICE == "cuda" and not reads_e4m3(torch.zeros(1, device=DEVICE)))):
        pytest.skip("there is no such reading")
    pairs = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    codes = pairs.view(torch.float8_e4m3fn if is_e4m3 else torch.int8).view(65536, 2).to(dtype)
    even, odd = (torch.full((65536,), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    _read_pairs[(1,)](pairs.to(DEVICE), even, odd, IS_E4M3=is_e4m3, IS_NATIVE=is_native)
    for got, want in ((even.cpu(), codes[:, 0]), (odd.cpu(), codes[:, 1])):
        is_number = ~want.isnan()  # E4M3's two NaN are never written without a scale of NaN
        assert is_number.sum() >= 65536 - 512 and torch.equal(got[is_number], want[is_number])


def computed(ptx: str, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What PTX's manual says of these few instructions, for words [n] in int64: the two results, 32 bits each."""
    registers = {"$2": word}

    def value(name: str) -> torch.Tensor:
        return torch.full_like(word, int(name, 16)) if name[:2] == "0x" else registers[name]

    for line in ptx.strip("{}\n").splitlines():
        opcode, *names = line.rstrip(";").replace(",", "").split()
        if opcode == ".reg":
            continue
        if opcode == "mov.b32":
            result = value(names[1])
        elif opcode == "lop3.b32":
            a, b, c = (value(name) for name in names[1:4])
            every = 2**32 - 1
            terms = (((a if i & 4 else a ^ every) & (b if i & 2 else b ^ every) & (c if i & 1 else c ^ every)) for i in range(8))
            result = sum((term for i, term in enumerate(terms) if int(names[4], 16) >> i & 1), torch.zeros_like(word))
        elif opcode in ("shl.b32", "shr.b32"):
            result = value(names[1]) << int(names[2]) if opcode == "shl.b32" else value(names[1]) >> int(names[2])
        elif opcode == "and.b32":
            result = value(names[1]) & value(names[2])
        else:
            a, b, c = (halves(value(name), opcode).double() for name in names[1:])
            assert opcode in ("fma.rn.f16x2", "fma.rn.bf16x2")
            numbers = (a * b + c).to(torch.bfloat16 if "bf16" in opcode else torch.float16)
            result = numbers.contiguous().view(torch.int32)[:, 0].long()
        registers[names[0]] = result & (2**32 - 1)
    return registers["$0"], registers["$1"]


def halves(words: torch.Tensor, kind: str) -> torch.Tensor:
    """[n] int64 -> [n, 2], the lower half first."""
    return words.to(torch.int32)[:, None].view(torch.bfloat16 if "bf16" in kind else torch.float16)


@pytest.mark.parametrize("name", ("BFLOAT16_OF_INT8", "FLOAT16_OF_INT8", "BFLOAT16_OF_E4M3", "FLOAT16_OF_E4M3"))
def test_the_assembly_reads_every_pair_of_codes_exactly(name: str) -> None:
    low = torch.arange(65536)
    high = low.flip(0)
    results = computed(getattr(kv_triton, name).value, low | high << 16)
    kind = torch.int8 if "INT8" in name else torch.float8_e4m3fn
    for place, result in enumerate(results):  # even codes, odd codes
        for half, pairs in enumerate((low, high)):
            want = pairs.to(torch.int16).view(kind).view(65536, 2)[:, place].double()
            is_number = ~want.isnan()
            assert is_number.sum() >= 65536 - 512
            assert torch.equal(
                halves(result, name.lower().replace("float16", "f16"))[:, half].double()[is_number], want[is_number]
            )
