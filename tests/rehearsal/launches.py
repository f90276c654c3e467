"""Every launch of a Triton kernel with its real arguments: checked, noted by its signature, and run in the interpreter.

What a launch is checked for is what CUDA would refuse or a kernel would not notice: tensors of the host, grids beyond a card's
limits, strides other than the kernel assumes, and tensors of 2^31 numbers and more where no test has a kernel reach that far.
What signatures are judged by, when a test has ended: judged.py.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.far import FAR
from tests.kernels.signatures import Signature, signature_of
from tests.rehearsal.device import DeviceError, DeviceTensor, Shared
from tests.rehearsal.operations import Operations

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid, by axis (CUDA C++ Programming Guide, technical specifications)
FOUND: list[Launches] = []  # of the test that runs

# By kernel, the arguments that say how a tensor lies, axis by axis; its last axis has stride 1. All other tensors have to be
# contiguous: no kernel reads more of how they lie than where they begin.
STRIDES = {
    "norms.triton._rms_kernel": {"x": ("x_stride",), "residual": ("residual_stride",)},
    "rotary.triton._kernel": {
        "query": ("query_token", "query_head"),
        "key": ("key_token", "key_head"),
        "value": ("value_token", "value_head"),
        "cos": ("cos_stride",),
        "sin": ("sin_stride",),
    },
    "sampling.triton._race": {"logits": ("row_stride",)},
    "sampling.triton_filter._survey": {"logits": ("row_stride",)},
    "sampling.triton_filter._cut": {"logits": ("row_stride",)},
}


class Launches:
    """`signatures`: how often each was launched, on a card of this `architecture`, 90 for 9.0. `operations`: what launched them,
    for the cards that are not rehearsed."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.signatures, self.operations = shared, dict[Signature, int](), Operations(self)
        self.runs = True  # where there are numbers
        self.one_at_a_time = threading.Lock()
        self.thread = threading.local()  # `launched`: by the operation that runs

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        FOUND.append(self)
        major, minor = torch.cuda.get_device_capability()
        self.architecture = 10 * major + minor
        run = InterpretedFunction.run

        def recorded(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self.note(kernel, args, grid, kwargs)
            inner = [_inner(one) for one in args]
            named = {key: _inner(one) for key, one in kwargs.items()}
            if not self.runs or any(isinstance(one, torch.Tensor) and one.is_meta for one in (*inner, *named.values())):
                return  # there are no numbers to compute with

            def again() -> None:
                with self.one_at_a_time:  # the interpreter keeps its state in globals
                    run(kernel, *inner, grid=grid, warmup=warmup, **named)

            if self.shared.graph is not None:
                for one in (*args, *kwargs.values()):
                    if isinstance(one, DeviceTensor):
                        self.shared.graph.touch(one)
            again()
            if self.shared.graph is not None:
                self.shared.graph.add(self.shared, again, kernel.fn.__name__, (args, kwargs))

        monkeypatch.setattr(InterpretedFunction, "run", recorded)
        self.operations.install(monkeypatch)

    def note(self, kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        signature, given = signature_of(kernel, args, kwargs)
        check(signature, given, grid(given) if callable(grid) else grid)
        self.signatures[signature] = self.signatures.get(signature, 0) + 1
        if hasattr(self.thread, "launched"):
            self.thread.launched.add(signature)


def check(signature: Signature, given: dict[str, Any], grid: tuple[int, ...]) -> None:
    """Raises DeviceError for a launch that CUDA would refuse or that would read something else than is meant."""
    name = f"{signature.module.removeprefix('vlserve.kernels.')}.{signature.kernel}"
    if any(not 0 < number <= most for number, most in zip(grid, MOST_PROGRAMS, strict=False)):
        raise DeviceError(f"{name} has a grid of {grid} programs")
    tensors = {key: one for key, one in given.items() if isinstance(one, torch.Tensor)}
    for key, one in tensors.items():
        if not isinstance(one, DeviceTensor):
            raise DeviceError(f"{name} is given a tensor of the host as {key!r}")
        if span(one) >= 2**31 and key not in FAR.get(name, ()):
            raise DeviceError(f"{name}: {key!r} spans {span(one)} numbers, and tests/kernels/far.py has no test of that")
        _check_strides(name, key, one, STRIDES.get(name, {}).get(key), given)
    if len(devices := {one.device for one in tensors.values()}) > 1:
        raise DeviceError(f"{name} is given tensors on {devices}")


def _check_strides(name: str, key: str, tensor: torch.Tensor, said: tuple[str, ...] | None, given: dict[str, Any]) -> None:
    if said is None:
        if not tensor.is_contiguous():
            raise DeviceError(
                f"{name}: {key!r} lies {tensor.stride()} for {tuple(tensor.shape)}, but the kernel takes no strides"
            )
        return
    strides = tuple(given[one] for one in said)
    lies = [have for size, have in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 or len(said) + 1 == tensor.ndim]
    wanted = [have for size, have in zip(tensor.shape, (*strides, 1), strict=True) if size > 1 or len(said) + 1 == tensor.ndim]
    if tensor.ndim != len(said) + 1 or lies != wanted:
        raise DeviceError(f"{name}: {key!r} lies {tensor.stride()} for {tuple(tensor.shape)}, but the kernel is told {strides}")


def span(tensor: torch.Tensor) -> int:
    """Numbers from a tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, DeviceTensor) else one
