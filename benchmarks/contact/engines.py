"""Whole engines on the device, against the CPU: kernel by kernel, as graphs, overlapped, in other types, on two ranks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.contact.asking import Answers, answer, compare, kept_answers, make_engine, make_prompts
from benchmarks.contact.isolated import CheckError, first_line
from benchmarks.contact.setting import Setting
from benchmarks.internvl3_1b import make_checkpoint
from vlserve.llm.int4_packing import pack_awq
from vlserve.models.checkpoint import DEMO
from vlserve.quantize.quantization_config import quantization_config
from vlserve.quantize.rounding import round_groups

FLOAT32 = {"tie": 1e-4, "within": 1e-3}
# a key that rounds to the code beside its own moves later log-probabilities; so do sums in another order in 16 bits
ROUNDED = {"tie": 0.1, "within": 0.1}
GROUP = 128
TINY_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": [72, 72],
}


def demo(setting: Setting) -> Path:
    """The checkpoint in the box; in a rehearsal one of its kind that the interpreter gets through."""
    if not setting.is_rehearsed:
        return DEMO
    return make_tiny(setting.kept / "tiny", seed=0)


def make_tiny(folder: Path, seed: int) -> Path:
    """Random, with the demo's tokenizer, and tiles of four patches."""
    if not (folder / "model.safetensors").exists():
        made = make_checkpoint(folder.with_name(folder.name + ".new"), seed, text=TINY_TEXT, vision=TINY_VISION)
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((made / name).read_text())
            (made / name).write_text(json.dumps(settings | {"image_seq_length": 1}))
        made.replace(folder)
    return folder


def eager(setting: Setting) -> None:
    _demo_answers_as_on_the_cpu(setting, "eager", enforce_eager=True, overlap=False)


def graphs(setting: Setting) -> None:
    _demo_answers_as_on_the_cpu(setting, "graphs", enforce_eager=False, overlap=False)


def overlap(setting: Setting) -> None:
    _demo_answers_as_on_the_cpu(setting, "overlap", enforce_eager=False, overlap=True)


def _demo_answers_as_on_the_cpu(setting: Setting, what: str, **options: Any) -> None:
    folder, scale = demo(setting), setting.scale
    prompts = make_prompts(folder, scale.items)
    want = kept_answers(setting, folder, prompts, scale.tokens, dtype="float32")
    with setting.device():
        engine = make_engine(folder, "cuda", dtype="float32", **_small(setting), **options)
        got = answer(engine, prompts, scale.tokens)
        decodes = engine.runner.decodes
        if (decodes is None) != options["enforce_eager"] or engine.overlaps != options["overlap"]:
            raise CheckError(f"the engine is not {what}: graphs {decodes is not None}, overlap {engine.overlaps}")
        if decodes is not None:
            pictures = engine.runner.encoder.graphs if engine.runner.encoder is not None else None
            recorded = decodes.graphs.recorded
            setting.found(recorded=list(recorded), pictures=list(pictures.graphs.recorded) if pictures else [])
            if not recorded:
                raise CheckError("no graph of a decode step was recorded; the log says why")
        compare(setting, what, got, want, **FLOAT32)


def _small(setting: Setting) -> dict[str, Any]:
    small = {"max_num_seqs": setting.scale.max_num_seqs}
    return small | ({"max_model_len": 128, "max_num_batched_tokens": 32, "kv_cache_gib": 0.001} if setting.is_rehearsed else {})


def forms(setting: Setting) -> None:
    """Each against the CPU with the same form; one that fails does not keep the others from being tried."""
    plain = demo(setting)
    quantised = make_awq(plain, setting.kept / f"{plain.name}-awq")
    tried: dict[str, tuple[Path, dict[str, Any]]] = {
        "AWQ": (quantised, {"dtype": "bfloat16"}),
        "AWQ in float32": (quantised, {}),
        "int8 cache": (plain, {"kv_cache_dtype": "int8"}),
        "fp8 cache": (plain, {"kv_cache_dtype": "fp8"}),
        "8-bit head": (plain, {"lm_head_bits": 8}),
    }
    scale = setting.scale
    prompts = make_prompts(plain, scale.forms)
    wanted = {
        what: kept_answers(setting, folder, prompts, scale.tokens, **options | {"dtype": "float32"})
        for what, (folder, options) in tried.items()
    }
    failed = []
    with setting.device():
        for what, (folder, options) in tried.items():
            try:
                got = answer(
                    make_engine(folder, "cuda", **{"dtype": "float32", **_small(setting), **options}), prompts, scale.tokens
                )
                compare(setting, what, got, wanted[what], **ROUNDED)
            except Exception as error:  # noqa: BLE001  (the next one is tried)
                setting.found(what=what, error=first_line(error))
                failed.append(what)
    if failed:
        raise CheckError(f"failed: {', '.join(failed)}")


def make_awq(plain: Path, folder: Path) -> Path:
    """The same model with its decoder's products in 4 bits, each weight to the nearest."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in plain.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if ".layers." in name and name.endswith("_proj.weight"):
            rounded = round_groups(tensor.float(), GROUP, torch.float16)
            stem = name.removesuffix("weight")
            packed = pack_awq(rounded.codes, rounded.scales, rounded.zeros)
            tensors |= {f"{stem}{key}": value for key, value in packed.items()}
        else:
            tensors[name] = tensor
    config = json.loads((plain / "config.json").read_text())
    outer = sorted({name.split(".")[0] for name in tensors} - {"language_model", "model", "lm_head"})
    config["quantization_config"] = quantization_config("awq", "awq", GROUP, outer)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def two_ranks(setting: Setting) -> None:
    """On one device, as threads of this process; their collectives go through the host, over Gloo."""
    folder, scale = demo(setting), setting.scale
    prompts = make_prompts(folder, scale.items)
    want = kept_answers(setting, folder, prompts, scale.tokens, dtype="float32")
    with setting.device():
        got = _on_two_ranks(folder, prompts, scale.tokens, _small(setting))
        compare(setting, "two ranks", got, want, **FLOAT32)


def _on_two_ranks(folder: Path, prompts: list[Any], max_tokens: int, options: dict[str, Any]) -> Answers:
    from tests.engine.ranks import tp_engine
    from vlserve.engine import engine as engine_module

    engine_module.resolve_device = lambda config, local_rank: torch.device("cuda", 0)  # type: ignore[assignment]
    threading.excepthook = lambda args: print(f"a rank failed: {args.exc_type.__name__}: {args.exc_value}")
    with tp_engine(folder, 2, **{"device": "cuda", "kv_cache_gib": 0.05, **options}) as (engine, runners):
        if any(runner.device.type != "cuda" for runner in runners):
            raise CheckError("a rank is not on the device")
        return answer(engine, prompts, max_tokens)
