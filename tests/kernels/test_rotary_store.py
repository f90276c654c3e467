"""Codes read and written by Triton, and what comes before attention, equal their definitions; interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_kernels import TOLERANCE, poisoned, rms_ratio, tensors
from tests.kernels.test_kv_codes import KINDS, awkward
from vlserve.kernels.kv_cache.reference import dequantize_ref, quantize_ref
from vlserve.kernels.kv_cache.types import LARGEST, Blocks, QuantizedBlocks
from vlserve.kernels.norms.reference import rms_norm_ref
from vlserve.kernels.rope import RopeConfig
from vlserve.kernels.rotary import rotary_store
from vlserve.kernels.rotary.reference import rotary_ref, rotary_store_ref
from vlserve.kernels.rotary.table import rotary_table

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels.kv_cache import triton as kv_triton
from vlserve.kernels.kv_cache.triton import numbers_of_pairs, reads_e4m3
from vlserve.kernels.rotary import triton as rotary_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHES = [pytest.param(None, id="same"), *KINDS]


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


def moved(blocks: Blocks) -> Blocks:
    there = [tensor.to(DEVICE) for tensor in tensors(blocks)]
    return QuantizedBlocks(*there) if isinstance(blocks, QuantizedBlocks) else there[0]


def is_written(blocks: Blocks) -> torch.Tensor:
    """Of each slot and head, [N, S, HK]."""
    return ~(blocks.scales.isnan() if isinstance(blocks, QuantizedBlocks) else blocks.isnan().any(-1))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim,has_norms", [(14, 2, 64, False), (5, 1, 80, True), (4, 4, 8, True)])
def test_rotary_store(heads: int, kv_heads: int, dim: int, has_norms: bool, dtype: torch.dtype, kind: torch.dtype | None) -> None:
    qkv = torch.randn(9, (heads + 2 * kv_heads) * dim).to(dtype)  # cut from one tensor, as a layer's are
    slots, positions = torch.randperm(40)[:9], torch.randint(0, 5000, (9,))
    cos_sin = rotary_table(RopeConfig(head_dim=dim), 5000)[positions].unbind(1)
    norms = (torch.rand(dim).to(dtype) + 0.5, torch.rand(dim).to(dtype) + 0.5) if has_norms else None
    there = [t.to(DEVICE) for t in (qkv, *cos_sin, slots)]
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    parts = [part.unflatten(-1, (-1, dim)) for part in there[0].split(sizes, -1)]
    caches = moved(poisoned((8, 5, kv_heads, dim), dtype, kind)), moved(poisoned((8, 5, kv_heads, dim), dtype, kind))
    moved_norms = None if norms is None else (norms[0].to(DEVICE), norms[1].to(DEVICE))
    got = rotary_triton.rotary_store_triton(*parts, (there[1], there[2]), caches, there[3], moved_norms, 1e-6)

    query, key, value = (part.double().unflatten(-1, (-1, dim)) for part in qkv.split(sizes, -1))
    if norms is not None:
        query, key = rms_norm_ref(query, norms[0].double(), 1e-6), rms_norm_ref(key, norms[1].double(), 1e-6)
    assert got.dtype == dtype and rms_ratio(got.cpu(), rotary_ref(query, *cos_sin)) < TOLERANCE[dtype]
    for cache, want in zip(caches, (rotary_ref(key, *cos_sin), value), strict=True):
        mask = is_written(cache).flatten(0, 1).cpu()
        assert mask.sum() == 9 * kv_heads and mask[slots].all()
        stored = cache if isinstance(cache, torch.Tensor) else dequantize_ref(cache, torch.float64)
        exact = (
            want if kind is None else dequantize_ref(QuantizedBlocks(*quantize_ref(want.to(torch.float32), kind)), torch.float64)
        )
        error = rms_ratio(stored.cpu().flatten(0, 1)[slots], exact)
        assert error < max(TOLERANCE[dtype], 0 if kind is None else 1 / LARGEST[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (8, 80))
def test_codes_are_those_of_the_definition(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Keys are turned by nothing; numbers range from nought and the tiniest to outliers and NaN."""
    both = torch.cat((awkward(2, dim, dtype), awkward(2, dim, dtype)), 1)
    both[7, 3, 2] = float("nan")
    key, value = both[:, :2], both[:, 2:]
    slots = torch.randperm(40)[: len(key)]
    still = torch.ones(len(key), dim // 2), torch.zeros(len(key), dim // 2)
    want = poisoned((8, 5, 2, dim), dtype, kind), poisoned((8, 5, 2, dim), dtype, kind)
    got = moved(want[0]), moved(want[1])
    rotary_store_ref(key, key, value, still, want, slots)
    there = [t.to(DEVICE) for t in (key, key, value, *still, slots)]
    rotary_triton.rotary_store_triton(*there[:3], (there[3], there[4]), got, there[5])
    for ours, (codes, scales) in zip(got, map(tensors, want), strict=True):
        assert isinstance(ours, QuantizedBlocks)
        torch.testing.assert_close(ours.scales.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        is_whole = ~scales.isnan()
        assert torch.equal(ours.codes.cpu()[is_whole], codes[is_whole])


@pytest.mark.parametrize("kind", CACHES)
def test_torchs_form_of_rotary_store(kind: torch.dtype | None) -> None:
    query, key, value = torch.randn(7, 6, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
    cos, sin = rotary_table(RopeConfig(head_dim=16), 7).unbind(1)
    norms, slots = (torch.rand(16), torch.rand(16)), torch.randperm(20)[:7]
    caches = [tuple(poisoned((4, 5, 2, 16), torch.float32, kind) for _ in range(2)) for _ in range(2)]
    got, want = (
        form(query, key, value, (cos, sin), pair, slots, norms, 1e-6)
        for form, pair in zip((rotary_store, rotary_store_ref), caches, strict=True)
    )
    assert rms_ratio(got, want) < TOLERANCE[torch.float32]
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(is_written(ours), is_written(theirs))
        ours, theirs = (b if kind is None else dequantize_ref(b, torch.float32) for b in (ours, theirs))
        assert rms_ratio(ours.nan_to_num(0), theirs.nan_to_num(0)) < (1e-6 if kind is None else 0.5 / LARGEST[kind])


def test_what_does_not_fit_is_refused_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"key \(2, 3, 8\).*cache of \(2, 4, 2, 8\)"):
        rotary_triton.rotary_store_triton(
            torch.zeros(2, 6, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), (torch.zeros(2, 4), torch.zeros(2, 4)),
            (torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)), torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
