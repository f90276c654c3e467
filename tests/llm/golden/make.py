"""Writes golden.json: what the packages that people quantise with make of the layers of format_reference.random_layer.

Not part of the suite, for it needs autoawq 0.2.9, gptqmodel 7.7.0 and compressed-tensors 0.20.0 beside torch 2.14.1 and
transformers 5.23.0, in an environment of their own; gptqmodel may be its unpacked source on PYTHONPATH.
Run from the repository's root: python -m tests.llm.golden.make
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

from tests.llm import format_reference as reference
from tests.llm.golden import CASES, Case, byte_pattern, eight_bit_scales, shuffled_groups

PACKAGES = ("autoawq", "gptqmodel", "compressed-tensors", "transformers", "torch")
# what they log, download and measure with, and ask for where nothing of it is used
ASIDE = {"accelerate", "datasets", "defuser", "device_smi", "dill", "logbar", "pcre", "threadpoolctl", "tokenicer", "torchao"}


class StandIns(MetaPathFinder, Loader):
    """Lets what is ASIDE be missing. Put behind all other finders, it is asked only for what is not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ASIDE else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock()

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def skip_init(*names: str) -> None:
    """Lets modules of a package be imported without its __init__, which asks for all that it ever worked with."""
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None, name
        module: Any = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
        module.DEBUG_ON = False  # gptqmodel's modules ask theirs for it
        sys.modules[name] = module


def linear_of(weights: reference.Array) -> torch.nn.Linear:
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight.data = torch.from_numpy(weights.astype(np.float32))
    return linear


def autoawq(case: Case) -> dict[str, torch.Tensor]:
    skip_init("awq", "awq.modules", "awq.modules.linear")
    kind = case.form.removeprefix("awq_")
    layer = getattr(importlib.import_module(f"awq.modules.linear.{kind}"), f"WQLinear_{kind.upper()}")
    codes, scales, zeros = case.layer()
    given = [torch.from_numpy(array.astype(np.float32)) for array in (scales, zeros)]
    if kind == "gemm":
        given = [tensor.t().contiguous() for tensor in given]
    linear = linear_of(reference.dequantize(codes, scales, zeros))
    made = layer.from_linear(linear, 4, case.group, scales=given[0], zeros=given[1])
    tensors = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales")}
    if kind == "gemm":
        from awq.utils.packing_utils import dequantize_gemm

        tensors["dequantized"] = dequantize_gemm(*(tensors[n] for n in ("qweight", "qzeros", "scales")), 4, case.group).t()
    return tensors


def gptqmodel(case: Case) -> dict[str, torch.Tensor]:
    skip_init("gptqmodel", "gptqmodel.models")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    codes, scales, zeros = case.layer()
    g_idx = shuffled_groups(case.inputs, case.group) if case.form.endswith("desc_act") else None
    linear = linear_of(reference.dequantize(codes, scales, zeros, g_idx))
    settings: dict[str, Any] = {"bits": 4, "group_size": case.group, "sym": False, "desc_act": g_idx is not None}
    layer = TorchLinear(in_features=case.inputs, out_features=case.outputs, bias=False, register_buffers=True, **settings)
    groups = None if g_idx is None else torch.from_numpy(g_idx)
    given = [torch.from_numpy(array.astype(np.float32)) for array in (scales, zeros)]
    layer.pack_original(linear, *given, g_idx=groups)
    layer.optimized = True  # else it compiles what is used once
    layer.post_init()
    dequantized = layer.dequantize_weight().t()
    if case.form.startswith("gptq_1"):
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=4, pack_dtype=torch.int32))
    return {**{name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, "dequantized": dequantized}


def gptqmodel_awq(case: Case) -> dict[str, torch.Tensor]:
    skip_init("gptqmodel", "gptqmodel.models")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    codes, scales, zeros = case.layer()
    linear = linear_of(reference.dequantize(codes, scales, zeros))
    settings: dict[str, Any] = {"bits": 4, "group_size": case.group, "sym": False, "desc_act": False}
    layer = AwqTorchLinear(in_features=case.inputs, out_features=case.outputs, bias=False, register_buffers=True, **settings)
    layer.pack(linear, *(torch.from_numpy(array.astype(np.float32)) for array in (scales, zeros)))
    return {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}


def compressed(case: Case) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    codes, scales, zeros = case.layer()
    symmetric = case.form == "compressed_symmetric"
    strategy: dict[str, Any] = {"strategy": "group", "group_size": case.group}
    if case.group == case.inputs:
        strategy = {"strategy": "channel"}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, symmetric=symmetric, **strategy))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    state = {
        "weight": torch.from_numpy(reference.dequantize(codes, scales, zeros).astype(np.float32)),
        "weight_scale": torch.from_numpy(scales.astype(np.float32)),
        "weight_zero_point": torch.from_numpy(zeros.astype(np.int8) - np.int8(8)),
    }
    packed = compressor.compress(state, scheme)
    packed["weight_scale"] = packed["weight_scale"].half()
    return {**packed, "dequantized": compressor.decompress(dict(packed), scheme)["weight"]}


def compressed_eight_bit(case: Case) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    _, number, strategy = case.form.split("_")
    block = {"block_structure": [case.group, case.group]} if strategy == "block" else {}
    kind = "float" if number == "fp8" else "int"
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=strategy, **block)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized" if number == "fp8" else "int-quantized")
    scale = torch.from_numpy(eight_bit_scales(case))
    stored = torch.from_numpy(byte_pattern(case)).view(torch.float8_e4m3fn if number == "fp8" else torch.int8)
    weight = compressor.decompress({"weight": stored, "weight_scale": scale}, scheme)["weight"]
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return {**packed, "dequantized": weight}


def transformers_fp8(case: Case) -> dict[str, torch.Tensor]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored = torch.from_numpy(byte_pattern(case)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(eight_bit_scales(case))
    return {"dequantized": Fp8Dequantize(None).convert({"weight": stored, "weight_scale_inv": scale})["weight"]}


def written(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as their bytes where these are few, else as their digest."""
    entries = {}
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        entry: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if name == "dequantized" or len(data) > 256:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        else:
            entry["base64"] = base64.b64encode(data).decode()
        entries[name] = entry
    return entries


def main() -> None:
    makers = {
        "autoawq": autoawq,
        "gptqmodel": gptqmodel,
        "gptqmodel_awq": gptqmodel_awq,
        "compressed": compressed,
        "compressed_eight_bit": compressed_eight_bit,
        "transformers_fp8": transformers_fp8,
    }
    sys.meta_path.append(StandIns())
    golden = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    golden |= {name: written(makers[case.maker](case)) for name, case in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in golden.items())
    Path(__file__).with_name("golden.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
