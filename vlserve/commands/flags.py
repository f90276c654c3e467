"""Command-line flags made from the fields of the configurations, so that flag, default and help exist once."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from vlserve.config import EngineConfig, MediaConfig, SamplingParams, ServerConfig

SAMPLING_FLAGS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
Config = type[EngineConfig] | type[MediaConfig] | type[ServerConfig] | type[SamplingParams]


def flag_fields(config: Config) -> list[Field[Any]]:
    """The fields that have a flag."""
    if config is SamplingParams:
        return [field for field in fields(config) if field.name in SAMPLING_FLAGS]
    return [field for field in fields(config) if field.name != "model" and field.metadata.get("flag", True)]


def flag_name(field: Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, title: str, config: Config, *, without: Collection[str] = ()) -> None:
    """Add a group with the flags of a configuration, but for the fields `without`; those not given come out as None."""
    group = parser.add_argument_group(f"{title} options")
    hints = get_type_hints(config)
    for field in flag_fields(config):
        if field.name in without:
            continue
        kind, several = _flag_type(hints[field.name])
        flag, text = flag_name(field), field.metadata["help"] + _default_text(field)
        settings: dict[str, Any] = {"dest": field.name, "default": None, "help": text}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        elif several:
            group.add_argument(flag, type=kind, action="append", metavar="TEXT", **settings)
        else:
            choices = field.metadata.get("choices")
            metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **settings)


def _default_text(field: Field[Any]) -> str:
    shown = field.default is not MISSING and field.default not in (None, (), "")
    return f" (default: {field.default})" if shown else ""


def _flag_type(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether the flag may come several times)."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False


def given(options: argparse.Namespace, *configs: Config) -> dict[str, Any]:
    """What was given on the command line, by field."""
    values = {field.name: getattr(options, field.name, None) for config in configs for field in fields(config)}
    return {name: value for name, value in values.items() if value is not None}
