"""Triton's interpreter without what it does again and again: a launch takes a third of the time, and gives the same."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the language is found once, and put in place once a launch for each module that has a function in it."""
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)
    monkeypatch.setattr(interpreter, "_patch_lang", _Patches(interpreter._patch_lang))
    monkeypatch.setattr(interpreter, "_get_np_dtype", _np_dtypes(interpreter._get_np_dtype))


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
