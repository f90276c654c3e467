"""`vlserve plan`: the degrees that a model can be cut by and what each rank holds, for people or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlserve.config import EngineConfig
from vlserve.errors import ModelError, VLServeError
from vlserve.plan.model_shape import Request

if TYPE_CHECKING:
    from vlserve.llm.stored_files import StoredTensor
    from vlserve.plan.footprint import Cut
    from vlserve.plan.tp_plan import Plan, RankPlan

HELP = "Show which tensor-parallel degrees a model allows and what each rank holds, before any weights are loaded."
ENGINE_FLAGS = (
    *("dtype", "lm_head_bits", "kv_cache_dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("gpu_memory_utilization", "vision_cache_gib"),
)
SWITCHES = ("enforce_eager", "language_model_only", "expert_parallel")
MIB, GIB = 2**20, 2**30
MAX_CONFIG_BYTES = 2**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = {field.name: field for field in fields(EngineConfig)}
    parser.add_argument(
        "model", nargs="?", default="demo", metavar="MODEL", help=known["model"].metadata["help"] + "; or a config.json itself"
    )
    parser.add_argument("--revision", metavar="TEXT", help=known["revision"].metadata["help"])
    parser.add_argument("--tp", type=int, metavar="N", help="plan for this degree; default: a row for each that works")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="GiB of one device: how many tokens and requests fit")
    parser.add_argument(
        "--replicate-kv-heads", action="store_true", help="also degrees above the KV heads, each then on several ranks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document; refusals and errors too")
    for name in ENGINE_FLAGS:
        field = known[name]
        shown = f" (default: {field.default})" if field.default is not None else ""
        kind = type(field.default) if isinstance(field.default, (str, float)) else int
        choices = field.metadata.get("choices")
        metavar = None if choices else "X" if kind is float else "N"
        text = field.metadata["help"] + shown
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=field.default, choices=choices, metavar=metavar, help=text
        )
    for name in SWITCHES:
        text = known[name].metadata["help"]
        parser.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, default=False, help=text)
    group = parser.add_argument_group("the requests that are counted")
    for flag, name, text in (
        ("--request-tokens", "text_tokens", "tokens of text in a prompt"),
        ("--request-images", "images", "pictures in a prompt"),
        ("--answer-tokens", "answer_tokens", "tokens of an answer"),
        ("--tiles-per-image", "tiles_per_image", "tiles of a picture, the thumbnail among them; default: of the largest one"),
    ):
        default = getattr(Request(), name)
        shown = f" (default: {default})" if default is not None else ""
        group.add_argument(flag, dest=name, type=int, default=default, metavar="N", help=text + shown)


def run(options: argparse.Namespace) -> int:
    """Print the plan; 0 if it is ok, 1 if not. Raises VLServeError without --json."""
    try:
        plan = _make(options)
    except VLServeError as error:
        if not options.json:
            raise
        print(json.dumps(_failed(options.tp, str(error))))
        return 1
    if options.json:
        print(json.dumps(plan.to_dict()))
        return 0 if plan.ok else 1
    if plan.ranks or plan.degrees:
        print(report(plan, options.model))
    if not plan.ok:
        print(f"vlserve: error: {plan.reason}", file=sys.stderr)
    return 0 if plan.ok else 1


def _make(options: argparse.Namespace) -> Plan:
    from vlserve.plan.tp_plan import make_plan

    path = _find_config(options.model, options.revision)
    asked = {name: getattr(options, name) for name in ENGINE_FLAGS + SWITCHES} | _cut(options, path.parent)
    stored, faults = _read_headers(path)
    return make_plan(
        _read_config(path),
        stored=stored,
        faults=faults,
        source=str(path),
        device_memory=options.device_memory,
        request=Request(**{field.name: getattr(options, field.name) for field in fields(Request)}),
        **asked,
    )


def _read_headers(path: Path) -> tuple[Mapping[str, StoredTensor] | None, tuple[str, ...]]:
    """Of the weights beside a config.json, None where not all can be read; and why not, where there are any."""
    from vlserve.llm.stored_files import ADAPTER, WEIGHTS
    from vlserve.models.settled_config import read_stored
    from vlserve.models.wrong_folder import CONFIG, check_folder

    folder = path.parent
    try:
        if path.name == CONFIG:
            check_folder(folder)
        return read_stored(folder), ()
    except ModelError as error:
        are_there = path.name == CONFIG and any(any(folder.glob(pattern)) for pattern in (*WEIGHTS, ADAPTER))
        return None, (str(error),) if are_there else ()


def _cut(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ranks and what they share: as asked, or as the folder was cut. Raises ConfigError where they differ."""
    from vlserve.llm.shards import read_shards
    from vlserve.models.checkpoint import check_shards

    asked: dict[str, Any] = {name: getattr(options, name) for name in ("tp", "replicate_kv_heads", "expert_parallel")}
    if options.tp is not None:
        check_shards(folder, EngineConfig(**asked))
        return asked
    try:
        shards = read_shards(folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    return asked if shards is None else {name: getattr(shards, name) for name in asked}


def _failed(tp: int | None, reason: str) -> dict[str, Any]:
    """The document of a plan that could not be made: the same keys, with nothing in them."""
    from vlserve.plan.tp_plan import Plan

    empty: dict[str, Any] = {field.name: [] if "tuple" in str(field.type) else None for field in fields(Plan)}
    if tp is not None:
        del empty["degrees"]
    return empty | {"ok": False, "supported": False, "reason": reason, "tp": tp}


def _find_config(model: str, revision: str | None) -> Path:
    """The config.json of `demo`, a folder or a Hub name (this file alone is downloaded), or the given file itself."""
    from vlserve.models.checkpoint import DEMO
    from vlserve.models.hub import why_unreachable
    from vlserve.models.wrong_folder import check_config, explain_file

    path = DEMO if model == "demo" else Path(model).expanduser()
    if path.is_file():
        if path.suffix in (".gguf", ".safetensors", ".bin"):
            raise ModelError(explain_file(path))
        return path
    if path.is_dir():
        check_config(path)
        return path / "config.json"
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"model {model!r}: no such file or folder. Give demo, a folder, a config.json, or a name such as org/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unreachable = why_unreachable()
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=bool(unreachable)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = unreachable or str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model {model!r}: no such folder here, and the Hugging Face Hub did not give it: {reason}") from error


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: more than {MAX_CONFIG_BYTES} bytes; expected a config.json")
        value = json.loads(text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def report(plan: Plan, model: str) -> str:
    """The plan as a page of text; `model` is what it is called."""
    plans = plan.degrees or (plan,)
    parts = [_title(plan, model), _unsupported(plan), _sizes(plans), _whole(plan), _degrees_line(plan), _memory(plan, plans)]
    parts += [f"Note: {note}." for note in plan.notes]
    return "\n\n".join(filter(None, parts))


def _title(plan: Plan, model: str) -> str:
    cache = "" if plan.kv_cache_dtype == "auto" else f", KV cache in {plan.kv_cache_dtype}"
    text = f"{model}: {plan.model_type} decoder, {plan.dtype}{cache}, up to {plan.max_model_len:,} tokens of context"
    if plan.device_memory is None:
        return text
    return text + f", devices of {plan.device_memory:g} GiB of which {plan.gpu_memory_utilization:.0%} are used"


def _unsupported(plan: Plan) -> str:
    return "\n  ".join(("vlserve cannot serve this model yet:", *plan.unsupported)) if plan.unsupported else ""


def _sizes(plans: Sequence[Plan]) -> str:
    """What is split, with each degree's share."""
    head = ["split over the ranks", "size", *(f"tp {plan.tp}" for plan in plans)]
    rows = [[cut.dimension, f"{cut.size:,}", *(_share(plan.cuts[i]) for plan in plans)] for i, cut in enumerate(plans[0].cuts)]
    padded = [f"tp {plan.tp}: {_padding(cut)}" for plan in plans for cut in plan.cuts if cut.padding]
    text = _table([head, *rows])
    return text + ("\n* padded with zeros: " + "; ".join(padded) if padded else "")


def _share(cut: Cut) -> str:
    return f"{cut.per_rank:,}" + ("*" if cut.padding else "") + (f" (on {cut.copies} ranks)" if cut.copies > 1 else "")


def _padding(cut: Cut) -> str:
    return f"{cut.dimension} by {cut.padding} {'row' if cut.padding == 1 else 'rows'}"


def _whole(plan: Plan) -> str:
    vision = "vision encoder and projector (so they set no constraint), " if plan.image_tokens else ""
    return (
        f"Whole on every rank: {vision}norms, biases of o_proj and down_proj.\n"
        "All-reduces in a step: one for the embedding, which is split by vocabulary, and two in each layer."
    )


def _degrees_line(plan: Plan) -> str:
    text = f"Degrees that work: {', '.join(map(str, plan.legal_tp))}"
    if plan.legal_tp_replicated:
        text += f"; with --replicate-kv-heads also {', '.join(map(str, plan.legal_tp_replicated))}"
    return text


def _memory(plan: Plan, plans: Sequence[Plan]) -> str:
    """Bytes per rank: one row a degree, or one a group of equal ranks."""
    one = plan.tp is not None
    head = [
        "rank" if one else "tp",
        "vision",
        "decoder",
        "embeddings",
        "activations",
        "features",
        "CUDA graphs",
        "in all",
        "KV per token",
    ]
    head += [] if plan.device_memory is None else ["KV tokens", "requests"] if one else ["KV tokens", "requests", "fits"]
    rows = [[name, *_bytes(rank)] for name, rank in _groups(plan)] if one else [[str(p.tp), *_bytes(p.ranks[0])] for p in plans]
    if plan.device_memory is not None:
        for i, row in enumerate(rows):
            of = plan if one else plans[i]
            row += [f"{of.kv_tokens:,}", f"{of.max_concurrent:,}"] + ([] if one else ["yes" if of.ok else "no"])
    text = f"Per rank{'' if one else ' (the first, which also samples)'}:\n{_table([head, *rows])}"
    if plan.device_memory is None:
        return text + "\nThe KV cache takes what is left; --device-memory GIB tells how many tokens and requests that is."
    text += f"\nA request here is {plan.request_tokens:,} tokens with its answer; a picture takes {plan.image_tokens:,} of them"
    if plan.request_tokens > plan.max_model_len:
        return text + f".\nThat is more than max_model_len {plan.max_model_len:,}: none can be served"
    return text + "\n(--request-tokens, --request-images, --answer-tokens). --max-num-seqs bounds how many run at once."


def _groups(plan: Plan) -> list[tuple[str, RankPlan]]:
    """Ranks that hold the same amount together: the first one gathers the logits, the others are alike but for whole experts."""
    found: dict[RankPlan, list[int]] = {}
    for rank in plan.ranks:
        found.setdefault(replace(rank, rank=0), []).append(rank.rank)
    return [(_numbers(ranks), of_all) for of_all, ranks in found.items()]


def _numbers(ranks: Sequence[int]) -> str:
    is_row = len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]}-{ranks[-1]}" if is_row else ", ".join(map(str, ranks))


def _bytes(rank: RankPlan) -> list[str]:
    weights = (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes)
    others = (rank.activation_bytes, rank.feature_bytes, rank.graph_bytes)
    return [*map(_binary, (*weights, *others, rank.total_bytes)), f"{rank.kv_bytes_per_token / 1024:,.1f} KiB"]


def _binary(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / MIB:,.1f} MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)
