"""What vlserve's engine uses of msgspec, in plain Python, for benchmarks on a machine that lacks it. It is slower, and messages
are JSON, not msgpack. benchmarks/gpu_contact.py puts it on the path where there is no msgspec, and says so."""

from __future__ import annotations

import dataclasses
import json as _json
import types
from collections.abc import Callable
from inspect import get_annotations
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

_MISSING = object()


class DecodeError(ValueError):
    pass


class _Field:
    def __init__(self, default: Any = _MISSING, default_factory: Callable[[], Any] | None = None) -> None:
        self.make = default_factory or (lambda: default)


field = _Field


class Struct:
    _fields: ClassVar[tuple[str, ...]] = ()
    _makers: ClassVar[dict[str, Callable[[], Any]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        own = tuple(get_annotations(cls))
        cls._fields = (*cls._fields, *own)
        cls._makers = cls._makers | {name: _maker(cls.__dict__[name]) for name in own if name in cls.__dict__}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self._fields, args, strict=False)) | kwargs
        if len(args) > len(self._fields) or not given.keys() <= set(self._fields):
            raise TypeError(f"{type(self).__name__} has no such field among {', '.join(given)}")
        for name in self._fields:
            if name not in given and name not in self._makers:
                raise TypeError(f"Missing required argument '{name}'")
            self.__dict__[name] = given[name] if name in given else self._makers[name]()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def _maker(default: Any) -> Callable[[], Any]:
    if isinstance(default, _Field):
        return default.make
    return (lambda: type(default)(default)) if isinstance(default, list | dict | set) else (lambda: default)


class structs:
    @staticmethod
    def replace(struct: Any, **changes: Any) -> Any:
        return type(struct)(**{**struct.__dict__, **changes})


class json:
    @staticmethod
    def decode(data: bytes, *, type: Any = Any) -> Any:
        try:
            return _converted(_json.loads(data), type)
        except (ValueError, TypeError) as error:
            raise DecodeError(str(error)) from error


class msgpack:
    class Encoder:
        def encode(self, value: Any) -> bytes:
            return _json.dumps(_plain(value)).encode()

    class Decoder:
        def __init__(self, type: Any) -> None:
            self._type = type

        def decode(self, data: bytes) -> Any:
            return json.decode(data, type=self._type)


def _plain(value: Any) -> Any:
    """As JSON has it: structs are lists of their fields, bytes texts of as many characters."""
    if isinstance(value, Struct):
        return [_plain(one) for one in value.__dict__.values()]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _converted(value: Any, hint: Any) -> Any:
    """JSON's value as the type wants it; raises ValueError."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for one in inner:
            try:
                return _converted(value, one)
            except (ValueError, TypeError):
                continue
        raise ValueError(f"{value!r} is no {hint}")
    is_struct = isinstance(hint, type) and origin is None and (issubclass(hint, Struct) or dataclasses.is_dataclass(hint))
    if is_struct and isinstance(value, dict | list):
        hints = get_type_hints(hint)
        given = dict(zip(hint._fields, value, strict=False)) if isinstance(value, list) else value
        return hint(**{name: _converted(one, hints[name]) for name, one in given.items() if name in hints})
    if hint is bytes and isinstance(value, str):
        return value.encode("latin-1")
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_converted(one, kind) for one, kind in zip(value, kinds, strict=True))
    if origin is list and isinstance(value, list):
        return [_converted(one, inner[0]) for one in value]
    if origin is dict and isinstance(value, dict):
        return {key: _converted(one, inner[1]) for key, one in value.items()}
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{value!r} is no {hint}")
