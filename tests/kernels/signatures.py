"""What Triton would compile for a launch, as its own binder computes it from the arguments: no driver is needed for that.

Tensors may be anywhere, in no memory at all: only their types count, and where they begin. What torch allocates begins at a
multiple of 512 bytes, so that is decided by their storage's offset.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.language import constexpr
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True, slots=True)
class Signature:
    """A kernel's parameters with their types, "constexpr" for what is compiled in, in their order; of which `aligned` begin
    at, or are, a multiple of 16; and the launch's options that are no default of Triton's."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        known = dict(self.constants)
        parts = [f"{name}={known[name]!r}" if kind == "constexpr" else f"{name}: {kind}" for name, kind in self.types]
        marked = [part + " /16" if name in self.aligned else part for part, (name, _) in zip(parts, self.types, strict=True)]
        options = "".join(f", {name}={value}" for name, value in self.options)
        return f"{self.module.removeprefix('vlserve.kernels.')}.{self.kernel}({', '.join(marked)}{options})"


class Pointer:
    """A tensor as Triton looks at it: a type, and an address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._at = tensor.storage_offset() * tensor.itemsize if tensor.numel() else 0  # of nothing torch gives no address

    def data_ptr(self) -> int:
        return self._at


def signature_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, dict[str, Any]]:
    """Of a launch `kernel[grid](*args, **kwargs)`, and all arguments by name; `kernel` is interpreted or not. Raises TypeError
    for what is neither an argument nor an option."""
    known, bind, options = compiled(kernel)
    given = [Pointer(one) if isinstance(one, torch.Tensor) else one for one in args]
    named = {key: Pointer(one) if isinstance(one, torch.Tensor) else one for key, one in kwargs.items()}
    bound, specialised, rest = bind(*given, **named)
    if unknown := rest.keys() - options:
        raise TypeError(f"{kernel.__name__} has no argument or option {', '.join(sorted(unknown))}")
    found = dict(zip(known.arg_names, specialised, strict=True))
    signature = Signature(
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        types=tuple((name, kind) for name, (kind, _) in found.items()),
        constants=tuple((name, bound[name]) for name, (kind, _) in found.items() if kind == "constexpr"),
        aligned=tuple(name for name, (kind, what) in found.items() if kind != "constexpr" and "D" in (what or "")),
        options=tuple(sorted((name, value) for name, value in rest.items() if value is not None)),
    )
    return signature, inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k not in rest}).arguments


@cache
def compiled(kernel: Any) -> tuple[JITFunction, Callable[..., Any], frozenset[str]]:
    """What Triton makes of the function where it compiles, its binder, and the names of a launch's options."""
    settings = ("do_not_specialize", "do_not_specialize_on_alignment")
    known = JITFunction(kernel.fn, **{name: _settings(kernel).get(name) for name in settings})
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return (
        known,
        create_function_from_signature(known.signature, known.params, backend),
        frozenset(vars(backend.parse_options({}))),
    )


def _settings(kernel: Any) -> dict[str, Any]:
    return kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)


@cache
def source_hash(module: str, kernel: str) -> str:
    """Of the source of a kernel, of all of ours that it calls, and of the numbers and texts that they name."""
    found = gathered(getattr(import_module(module), kernel))
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def gathered(kernel: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    _gather(kernel, found)
    return found


def _gather(kernel: Any, found: dict[str, str]) -> None:
    function = kernel.fn
    key = f"{function.__module__}.{function.__qualname__}"
    if key in found:
        return
    found[key] = ast.dump(ast.parse(textwrap.dedent(inspect.getsource(function))))
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if hasattr(value, "fn") and getattr(value.fn, "__module__", "").startswith("vlserve."):
            _gather(value, found)
        elif isinstance(value, (constexpr, int, float, str)):
            found[f"{key} {name}"] = repr(value)


def _names(code: Any) -> Iterator[str]:
    yield from code.co_names
    for one in code.co_consts:
        if inspect.iscode(one):
            yield from _names(one)
