"""Eight-bit keys and values within Triton's kernels: codes to numbers, numbers to codes.

E4M3 is read from its bits where the device has no such type (below compute capability 8.9), and always written by its
bits; scales are read and written as the bits of bfloat16, which the interpreter does not compute with.

Codes are read two at a time, and on a GPU two such pairs in a register, by a few instructions of PTX: from the same
expressions on 16-bit numbers the compiler makes three times as many. The expressions are what is interpreted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NATIVE_E4M3 = (8, 9)  # compute capability
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $2 has pairs of codes in its halves; $0 gets the even codes' numbers, $1 the odd ones'; either may be $2's own register.
# 0xEA is (a & b) | c, 0x6A (a & b) ^ c.
BFLOAT16_OF_INT8 = tl.constexpr("""{
.reg .b32 p, w, a, b, m;
mov.b32 p, $2;
mov.b32 m, 0xBF80BF80;
lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 b, p, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, b, m, a;
shr.b32 w, p, 8;
lop3.b32 a, w, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 b, w, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, b, m, a;
}""")
FLOAT16_OF_INT8 = tl.constexpr("""{
.reg .b32 p, w, a, m, c;
mov.b32 p, $2;
mov.b32 m, 0x3C003C00;
mov.b32 c, 0xE480E480;
lop3.b32 a, p, 0x00FF00FF, 0x64806480, 0x6A;
fma.rn.f16x2 $0, a, m, c;
shr.b32 w, p, 8;
lop3.b32 a, w, 0x00FF00FF, 0x64806480, 0x6A;
fma.rn.f16x2 $1, a, m, c;
}""")
BFLOAT16_OF_E4M3 = tl.constexpr("""{
.reg .b32 p, a, b, m, c;
mov.b32 p, $2;
mov.b32 m, 0x7B807B80;
mov.b32 c, 0x80008000;
shl.b32 a, p, 4;
and.b32 a, a, 0x07F007F0;
shl.b32 b, p, 8;
lop3.b32 a, b, 0x80008000, a, 0xEA;
fma.rn.bf16x2 $0, a, m, c;
shr.b32 a, p, 4;
and.b32 a, a, 0x07F007F0;
lop3.b32 a, p, 0x80008000, a, 0xEA;
fma.rn.bf16x2 $1, a, m, c;
}""")
FLOAT16_OF_E4M3 = tl.constexpr("""{
.reg .b32 p, a, b, m, c;
mov.b32 p, $2;
mov.b32 m, 0x5C005C00;
mov.b32 c, 0x80008000;
shl.b32 a, p, 7;
and.b32 a, a, 0x3F803F80;
shl.b32 b, p, 8;
lop3.b32 a, b, 0x80008000, a, 0xEA;
fma.rn.f16x2 $0, a, m, c;
shr.b32 a, p, 1;
and.b32 a, a, 0x3F803F80;
lop3.b32 a, p, 0x80008000, a, 0xEA;
fma.rn.f16x2 $1, a, m, c;
}""")


def reads_e4m3(x: torch.Tensor) -> bool:
    """Whether x's device converts E4M3 itself."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= NATIVE_E4M3


@triton.jit
def numbers_of_pairs(pairs, dtype: tl.constexpr, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Two codes in an int16 -> the even (lower) one and the odd one as numbers of dtype, without their scale; all are exact."""
    if IS_NATIVE and dtype != tl.bfloat16:
        even, odd = (pairs & 0xFF).to(tl.uint8), ((pairs >> 8) & 0xFF).to(tl.uint8)
        even, odd = even.to(tl.float8e4nv, bitcast=True).to(tl.float16), odd.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif IS_E4M3 and dtype == tl.bfloat16:  # exponent and mantissa at bfloat16's places: the number over 2^120
        if IS_INTERPRETED:
            even, odd = ((pairs << 8) & -0x8000) | ((pairs << 4) & 0x07F0), (pairs & -0x8000) | ((pairs >> 4) & 0x07F0)
            even, odd = even.to(tl.bfloat16, bitcast=True) * 2.0**120, odd.to(tl.bfloat16, bitcast=True) * 2.0**120
        else:
            even, odd = _assembled(pairs, BFLOAT16_OF_E4M3, tl.bfloat16)
    elif IS_E4M3:  # at float16's: over 2^8
        if IS_INTERPRETED:
            even, odd = ((pairs << 8) & -0x8000) | ((pairs << 7) & 0x3F80), (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
            even, odd = even.to(tl.float16, bitcast=True) * 256.0, odd.to(tl.float16, bitcast=True) * 256.0
        else:
            even, odd = _assembled(pairs, FLOAT16_OF_E4M3, tl.float16)
    elif dtype == tl.bfloat16:  # which has seven bits behind the first one
        if IS_INTERPRETED:
            even, odd = _bfloat16_of_int8(pairs), _bfloat16_of_int8(pairs >> 8)
        else:
            even, odd = _assembled(pairs, BFLOAT16_OF_INT8, tl.bfloat16)
    else:  # 1024 + (code + 128)
        if IS_INTERPRETED:
            even, odd = (pairs & 0xFF) ^ 0x6480, ((pairs >> 8) & 0xFF) ^ 0x6480
            even, odd = even.to(tl.float16, bitcast=True) - 1152.0, odd.to(tl.float16, bitcast=True) - 1152.0
        else:
            even, odd = _assembled(pairs, FLOAT16_OF_INT8, tl.float16)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def _assembled(pairs, PTX: tl.constexpr, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(PTX, "=r,=r,r", [pairs], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(PTX, "=r,=r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def _bfloat16_of_int8(codes):
    """128 + the lower seven bits, less 128, or 256 where the sign is set."""
    low, sign = (codes & 0x7F) | 0x4300, (codes & 0x80) | 0x4300
    return low.to(tl.bfloat16, bitcast=True) - sign.to(tl.bfloat16, bitcast=True)


@triton.jit
def number_of_bits(bits):
    """bfloat16 as int16 -> float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bits_of_number(x):
    """float32 -> bfloat16 as int32, rounded to nearest, ties to even; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)


@triton.jit
def e4m3_of_number(x):
    """float32 within +-464 -> E4M3 as uint8, rounded to nearest, ties to even."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960: the exponents' biases, 127 and 7, apart by 120
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # near 2^14 float32 has the steps of 2^-9
    code = tl.where(size < 0.015625, subnormal, normal)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
