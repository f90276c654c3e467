"""What a checkpoint says of its quantised weights, and how many bytes they take on a rank. No torch, no weights.

Read from `quantization_config` wherever it hides, in the words of AutoAWQ, GPTQ, compressed-tensors and the FP8 formats.
Raises ValueError with the key, the value found and what is supported.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INT4, FP8, INT8, MXFP4 = "int4", "fp8", "int8", "mxfp4"
SECTIONS = ("", "text_config", "llm_config")  # of config.json
FILES = ("quantize_config.json", "quant_config.json")  # what AutoGPTQ and the first AWQ wrote beside config.json
SUPPORTED = (
    "awq (4 bits, gemm or gemv), gptq (4 bits), compressed-tensors (pack-quantized with 4 bits, float-quantized FP8 E4M3, "
    "int-quantized with 8 bits), fp8 and fbgemm_fp8 (E4M3), mxfp4 (of experts)"
)
MXFP4_GROUP = 32  # inputs that share a scale
SMALLEST_GROUP = 16  # inputs that share a scale; what the kernels take


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How the decoder's linear layers are stored. Which of them are quantised, their tensors say; `covers` foretells it."""

    where: str  # for messages
    method: str
    kind: str  # INT4, FP8, INT8 or MXFP4
    group_size: int | None = None  # INT4: inputs that share a scale; None: all of a row
    block: tuple[int, int] | None = None  # FP8: (outputs, inputs) that share a scale; None: rows or all
    version: str = ""  # AutoAWQ's gemm or gemv, GPTQ's checkpoint_format
    symmetric: bool | None = None  # None where nothing is said
    reordered: bool = False  # groups are not of neighbouring inputs
    ignored: tuple[str, ...] = ()  # parts of names, or patterns behind "re:"

    def __str__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size else ""
        blocks = f", blocks of {self.block[0]}x{self.block[1]}" if self.block else ""
        return f"{self.method}{f' {self.kind}' * (self.kind != self.method)}{groups}{blocks}"

    def check_inputs(self, in_features: int, name: str) -> None:
        """Raises ValueError where groups do not divide a layer's inputs."""
        if self.kind == INT4 and self.group_size is not None and in_features % self.group_size:
            raise ValueError(
                f"{self.where}: group_size {self.group_size} does not divide the {in_features} inputs of {name}; supported: "
                "whole groups, or -1 for one group a row"
            )

    def covers(self, name: str) -> bool:
        """Whether the linear layer `name`, as in `model.layers.0.mlp.up_proj`, is quantised as far as the config tells."""
        if self.kind == MXFP4 and ".mlp." not in name:
            return False
        return not any(_matches(pattern, name) for pattern in self.ignored)

    def linear_bytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Of a rank's part of a linear layer with codes and scales; `itemsize`: bytes of a number to compute with."""
        if not inputs:  # of an expert that there is not
            return 0
        if self.kind == MXFP4:
            return outputs * -(-inputs // MXFP4_GROUP) * (MXFP4_GROUP // 2 + 1)
        if self.kind == INT4:
            size, group = grouped(inputs, self.group_size)
            order = 4 * inputs * self.reordered
            return outputs * (size // 2 + size // group * (itemsize + 1)) + order
        groups = 1 if self.block is None else padded_groups(inputs, self.block[1]) // self.block[1]
        return outputs * (inputs + 4 * groups)


def padded_groups(size: int, group: int) -> int:
    """Places for a rank's `size` inputs, in whole groups from a group's edge, the same on every rank.

    Ranks start at multiples of `size`, so what one may lack at the front is known without its number.
    """
    return -(-(size + group - math.gcd(group, size)) // group) * group


def grouped(size: int, group_size: int | None) -> tuple[int, int]:
    """(places, group) in which a rank keeps `size` inputs that a checkpoint has in groups of `group_size`.

    A share that does not end with a group is padded with zeros or kept in finer groups with the scales repeated,
    whichever takes fewer bytes; both are exact.
    """
    if group_size is None:
        size = -(-size // SMALLEST_GROUP) * SMALLEST_GROUP
        return size, size
    finer = [SMALLEST_GROUP]
    while group_size % (2 * finer[-1]) == 0:
        finer.append(2 * finer[-1])
    sizes = {group: padded_groups(size, group) for group in finer}
    # half a byte a code, three bytes a group
    group = min(reversed(finer), key=lambda group: sizes[group] // group * (group + 6))
    return sizes[group], group


def find_quantisation(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None) -> Quantisation | None:
    """Of a whole config.json, or of the FILES beside it (by name); None for a checkpoint that says nothing."""
    for section in SECTIONS:
        within = config.get(section) if section else config
        given = within.get("quantization_config") if isinstance(within, Mapping) else None
        if given:
            return _read(given, f"config.json's {section + '.' if section else ''}quantization_config")
    for name, found in (files or {}).items():
        return _read(found, name)
    return None


def _read(given: Any, where: str) -> Quantisation:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}; expected an object with quant_method; supported: {SUPPORTED}")
    method = given.get("quant_method") or ("awq" if "w_bit" in given or given.get("version") else "gptq")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _fp8, "fbgemm_fp8": _fp8}
    readers["mxfp4"] = _mxfp4
    if not isinstance(method, str) or method.lower() not in readers:
        raise ValueError(f"{where}.quant_method {method!r} is not supported; supported: {SUPPORTED}")
    try:
        return readers[method.lower()](given, where)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _awq(given: Mapping[str, Any], where: str) -> Quantisation:
    _check(where, "bits", given.get("bits", given.get("w_bit")), (4,))
    version = _check(where, "version", str(given.get("version") or "gemm").lower(), ("gemm", "gemv"))
    return Quantisation(
        where=where,
        method="awq",
        kind=INT4,
        group_size=_group_size(where, given.get("group_size", given.get("q_group_size"))),
        version=version,
        symmetric=False,
        ignored=_names(given, where, "modules_to_not_convert"),
    )


def _gptq(given: Mapping[str, Any], where: str) -> Quantisation:
    _check(where, "bits", given.get("bits"), (4,))
    written = _check(where, "checkpoint_format", given.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2"))
    group_size, symmetric = _group_size(where, given.get("group_size")), given.get("sym")
    return Quantisation(
        where=where,
        method="gptq",
        kind=INT4,
        group_size=group_size,
        version=written,
        symmetric=None if symmetric is None else bool(symmetric),
        reordered=bool(given.get("desc_act")) and group_size is not None,
        ignored=(*_names(given, where, "modules_to_not_convert"), *_dynamic(given.get("dynamic") or {}, where)),
    )


def _dynamic(rules: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """GPTQModel's rules by pattern: those with "-:" leave layers out, the others must not change the format."""
    for pattern, rule in rules.items():
        for key in ("bits", "group_size", "desc_act", "sym"):
            if not pattern.startswith("-:") and isinstance(rule, Mapping) and key in rule:
                raise ValueError(f"{where}.dynamic[{pattern!r}] sets {key}; supported: one format for all quantised layers")
    return tuple("re:" + pattern.removeprefix("-:") for pattern in rules if pattern.startswith("-:"))


def _fp8(given: Mapping[str, Any], where: str) -> Quantisation:
    _check(where, "fmt", given.get("fmt") or "e4m3", ("e4m3",))
    names = ("modules_to_not_convert", "ignored_layers", "ignore")
    return Quantisation(
        where=where,
        method=str(given["quant_method"]),
        kind=FP8,
        block=_block(where, "weight_block_size", given.get("weight_block_size")),
        symmetric=True,
        ignored=tuple(name for key in names for name in _names(given, where, key)),
    )


def _mxfp4(given: Mapping[str, Any], where: str) -> Quantisation:
    """Of experts alone; names of what is not converted have `*` in them. `dequantize` is transformers' way to read it."""
    ignored = tuple("re:" + fnmatch.translate(name + "*") for name in _names(given, where, "modules_to_not_convert"))
    return Quantisation(where=where, method="mxfp4", kind=MXFP4, symmetric=True, ignored=ignored)


def _compressed(given: Mapping[str, Any], where: str) -> Quantisation:
    for key in ("transform_config", "sparsity_config"):
        found = given.get(key) or {}
        if found and found.get("format", "") != "dense":
            raise ValueError(f"{where}.{key} is {found!r}; supported: none")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError(f"{where}.config_groups is {groups!r}; expected an object with a group of weights")
    formats = [(dict(group.get("weights") or {}), group.get("format") or given.get("format")) for group in groups.values()]
    if any(entry != formats[0] for entry in formats):
        raise ValueError(
            f"{where}.config_groups has {len(formats)} groups stored in different ways; supported: one format for all"
        )
    weights, written = formats[0]
    key = f"{where}.config_groups weights"
    kind = _compressed_kind(weights, written, where, key)
    strategies = {INT4: ("group", "channel"), FP8: ("tensor", "channel", "block"), INT8: ("tensor", "channel")}[kind]
    strategy = _check(key, "strategy", weights.get("strategy"), strategies)
    return Quantisation(
        where=where,
        method="compressed-tensors",
        kind=kind,
        group_size=_group_size(key, weights.get("group_size")) if strategy == "group" else None,
        block=_block(key, "block_structure", weights.get("block_structure")) if strategy == "block" else None,
        symmetric=bool(weights.get("symmetric", True)),
        reordered=weights.get("actorder") in ("group", True),
        ignored=_names(given, where, "ignore", is_whole=True),
    )


def _compressed_kind(weights: Mapping[str, Any], written: Any, where: str, key: str) -> str:
    formats = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
    _check(where, "format", written, formats)
    number = _check(key, "type", weights.get("type", "int"), ("float",) if written == "float-quantized" else ("int", "float"))
    _check(key, "num_bits", weights.get("num_bits"), (4,) if written == "pack-quantized" else (8,))
    if written == "pack-quantized":
        _check(key, "type", number, ("int",))
        return INT4
    if number == "int":
        _check(key, "symmetric", weights.get("symmetric", True), (True,))
    return FP8 if number == "float" else INT8


def _check(where: str, key: str, value: Any, supported: tuple[Any, ...]) -> Any:
    if value not in supported or isinstance(value, bool) != isinstance(supported[0], bool):
        raise ValueError(f"{where}.{key} {value!r} is not supported; supported: {', '.join(map(str, supported))}")
    return value


def _group_size(where: str, value: Any) -> int | None:
    if value == -1:
        return None
    if not isinstance(value, int) or value < SMALLEST_GROUP or value % SMALLEST_GROUP:
        raise ValueError(f"{where}.group_size {value!r} is not supported; supported: multiples of {SMALLEST_GROUP}, or -1")
    return value


def _block(where: str, key: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ValueError(f"{where}.{key} {value!r} is not supported; supported: two numbers, such as [128, 128]")
    return (value[0], value[1])


def _names(given: Mapping[str, Any], where: str, key: str, *, is_whole: bool = False) -> tuple[str, ...]:
    """Layers that are left out: parts of names, or whole names (`=`) and patterns behind `re:`."""
    found = given.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{where}.{key} is {found!r}; expected a list of names")
    return tuple(name if not is_whole or name.startswith("re:") else "=" + name for name in found)


def _matches(pattern: str, name: str) -> bool:
    """`name` begins with `model.layers`; a checkpoint may have the language model under several prefixes."""
    short = name.removeprefix("model.")
    names = [name, *(prefix + short for prefix in ("language_model.model.", "model.language_model.", "language_model."))]
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], candidate) for candidate in names)
    if pattern.startswith("="):
        return pattern[1:] in names
    return any(pattern in candidate for candidate in names)
