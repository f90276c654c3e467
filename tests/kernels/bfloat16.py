"""bfloat16 for Triton's interpreter, which holds it as uint16 and computes with those bits as if they were whole numbers.

Not for reductions: kernels sum in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def number_of(handle: Any) -> Any:
    """The same as float32, where it is bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def bfloat16_of(numbers: np.ndarray[Any, Any]) -> Any:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = np.where(np.isnan(numbers), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def compute_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = InterpreterBuilder
    binary, cast, dot = builder.binary_op, builder.cast_impl, builder.create_dot

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar) or operation in (np.bitwise_and, np.bitwise_or):
            return binary(self, left, right, operation)
        result = operation(number_of(left).data, number_of(right).data)
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else bfloat16_of(result)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == kind.scalar or tl.bfloat16 not in (source.dtype.scalar, kind.scalar):
            return cast(self, source, kind)
        if kind.scalar == tl.bfloat16:
            return bfloat16_of(source.data.astype(np.float32))
        return TensorHandle(number_of(source).data.astype(np.dtype(kind.scalar.name.replace("fp", "float"))), kind.scalar)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return dot(self, number_of(left), number_of(right), *rest)

    for name, replaced in (("binary_op", binary_op), ("cast_impl", cast_impl), ("create_dot", create_dot)):
        monkeypatch.setattr(builder, name, replaced)
    monkeypatch.setattr(builder, "get_bf16", lambda self, value: bfloat16_of(np.array([value], np.float32)), raising=False)
