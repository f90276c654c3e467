"""Every launch of a Triton kernel with its real arguments: checked, noted by its signature, and run in the interpreter."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from tests.rehearsal.device import DeviceError, DeviceTensor, Shared

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by axis (CUDA C++ Programming Guide, technical specifications)
ALIGNED = 16  # bytes, and a number's divisor, that Triton specialises on
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True, slots=True)
class Signature:
    """What Triton compiles for: kernel, and of each argument its type with what is known of it, or its constant."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, int], ...]


class Launches:
    """`signatures`: how often each was launched."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.signatures = shared, dict[Signature, int]()
        self.one_at_a_time = threading.Lock()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launch, run = GridExecutor.__call__, InterpretedFunction.run

        def told(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
            self.plain = tuple(kernel.kwargs.get("do_not_specialize") or ())
            run(kernel, *args, **kwargs)

        def recorded(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            grid = executor.grid(given) if callable(executor.grid) else executor.grid
            signature = describe(executor, given, grid, options, self.plain)
            self.signatures[signature] = self.signatures.get(signature, 0) + 1
            inner = [_inner(one) for one in args]
            named = {key: _inner(one) for key, one in kwargs.items()}
            if any(isinstance(one, torch.Tensor) and one.is_meta for one in (*inner, *named.values())):
                return  # there are no numbers to compute with

            def again() -> None:
                with self.one_at_a_time:  # the interpreter keeps its state in globals
                    launch(executor, *inner, **named)

            if self.shared.graph is not None:
                for one in (*args, *kwargs.values()):
                    if isinstance(one, DeviceTensor):
                        self.shared.graph.touch(one)
            again()
            if self.shared.graph is not None:
                self.shared.graph.add(self.shared, again, executor.fn.__name__, (args, kwargs))

        monkeypatch.setattr(GridExecutor, "__call__", recorded)
        monkeypatch.setattr(InterpretedFunction, "run", told)


def describe(
    executor: Any, given: dict[str, Any], grid: tuple[int, ...], options: dict[str, int], plain: tuple[str, ...] = ()
) -> Signature:
    """Raises DeviceError for a launch that CUDA would refuse or that would read something else than is meant."""
    name = executor.fn.__name__
    if any(not 0 < number <= most for number, most in zip(grid, MOST_PROGRAMS, strict=False)):
        raise DeviceError(f"{name} has a grid of {grid} programs")
    annotations = getattr(executor.fn, "__annotations__", {})
    arguments = tuple(
        (key, f"constant {value!r}" if "constexpr" in str(annotations.get(key)) else _kind(name, key, value, key in plain))
        for key, value in given.items()
    )
    return Signature(executor.fn.__module__, name, arguments, tuple(sorted(options.items())))


def _kind(kernel: str, key: str, value: Any, is_plain: bool = False) -> str:
    if isinstance(value, DeviceTensor):
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        wide = " wide" if last >= 2**31 else ""
        offset = value.storage_offset() * value.itemsize if value.numel() else 0  # of nothing torch gives no address
        return f"*{value.dtype}{'' if offset % ALIGNED else ' aligned'}{wide}"
    if isinstance(value, torch.Tensor):
        raise DeviceError(f"{kernel} is given a tensor of the host as {key!r}")
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        if is_plain:
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        if value == 1:
            return "1"
        return ("i32" if -(2**31) <= value < 2**31 else "i64") + ("" if value % ALIGNED else " aligned")
    if isinstance(value, float):
        return "fp32"
    return repr(value)


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, DeviceTensor) else one
