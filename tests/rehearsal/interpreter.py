"""Triton's interpreter without what it does again and again: a launch takes a fourth of the time, and gives the same."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the language is found once, and put in place once a launch for each module that has a function in it.

    Types and shapes are made once. Whether whole numbers of 32 bits are large enough is left to the kernels' tests.
    """
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(interpreter, "_patch_lang", _Patches(interpreter._patch_lang))
    monkeypatch.setattr(interpreter, "_get_np_dtype", _np_dtypes(interpreter._get_np_dtype))
    monkeypatch.setattr(tl.core.block_type, "__init__", _block_types(tl.core.block_type.__init__))
    monkeypatch.setattr(tl.core.tensor, "__init__", _init_tensor)
    monkeypatch.setattr(tl.core.tuple, "__eq__", _same_or(tl.core.tuple.__eq__))
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


class _Patches:
    """Stands for `_patch_lang`, which is called for a kernel, and for each call of a function within it."""

    def __init__(self, patch: Any) -> None:
        self._patch, self._scopes = patch, dict[int, Any]()  # by the module's names

    def __call__(self, fn: Any) -> _Patches:
        if id(fn.__globals__) not in self._scopes:
            self._scopes[id(fn.__globals__)] = self._patch(fn)
        return self

    def restore(self) -> None:
        while self._scopes:
            self._scopes.popitem()[1].restore()


def _block_types(init: Any) -> Any:
    known: dict[Any, dict[str, Any]] = {}

    def init_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(one.value if isinstance(one, tl.constexpr) else one for one in shape)
        key = id(type(element_ty)), str(element_ty), sizes
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    return init_once


@cache
def _constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(size) for size in shape])


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _constants(type.shape if type.is_block() else ())


def _same_or(equals: Any) -> Any:
    yes = tl.constexpr(True)
    return lambda self, other: yes if self is other else equals(self, other)


def _np_dtypes(find: Any) -> Any:
    known: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        scalar = kind.scalar
        if isinstance(scalar, tl.pointer_type):
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return get
