"""From a checkpoint in one format to a folder in the other: what is read, checked and written, a tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlserve.convert.companions import choose_conversation, write_hf, write_original
from vlserve.convert.settings import hf_config, original_config
from vlserve.convert.tensors import LANGUAGE, to_hf, to_original
from vlserve.engine.loading import build_model
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.shards import read_shards
from vlserve.llm.stored_files import INDEX, SINGLE, checkpoint_files
from vlserve.llm.stored_names import expanded
from vlserve.llm.tensor_file import Kind, TensorFile
from vlserve.llm.tensor_parallel import Split
from vlserve.llm.weights import match_tensors
from vlserve.models.base import Model
from vlserve.models.checkpoint import Checkpoint, find_folder, read_checkpoint
from vlserve.models.companion_files import companion_files
from vlserve.whole_folder import check_out, check_room, gib, whole_or_nothing

HF, ORIGINAL = "hf", "original"
FORMATS = {HF: "internvl", ORIGINAL: "internvl_chat"}  # model_type of each
MAX_FILE = 4 * 2**30  # bytes
EMBEDDING, HEAD = f"{LANGUAGE}model.embed_tokens.weight", f"{LANGUAGE}lm_head.weight"
PIXELS = (
    "transformers resizes pictures with torch, and OpenGVLab's code with Pillow; the last bits of pixels that are resized differ"
)
CODE = (
    "config.json has no auto_map, since no code is written. vlserve needs none; OpenGVLab's own way to load it, and servers that "
    "go that way, need its .py files and the auto_map of a repository of the same generation"
)
TEMPLATE = (
    "config.json's template is {!r}, the nearest to the chat template, which writes other prompts where there is no system "
    "message or in other places; what reads chat_template.jinja, as vlserve does, writes the same as before"
)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written: pieces of stored ones, one below the other."""

    kind: Kind
    shape: tuple[int, ...]
    pieces: tuple[Any, ...]  # handles

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.kind.dtype.itemsize

    def read(self) -> torch.Tensor:
        tensors = [piece[...] for piece in self.pieces]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def convert(model: str, out: Path, to: str, revision: str | None = None) -> list[str]:
    """Write the folder `out`; returns what was written and what to know of it, in words.

    Raises ConfigError for a folder or a model that does not do, ModelError for a checkpoint that is not whole.
    """
    out = check_out(out)
    checkpoint = read_checkpoint(find_folder(model, revision))
    _check_format(checkpoint, to)
    try:
        _check_whole(checkpoint)
        if to == HF:
            config, notes = hf_config(checkpoint), [PIXELS]
        else:
            template, is_same = choose_conversation(checkpoint)
            config = original_config(checkpoint, template)
            notes = [CODE, PIXELS, *([] if is_same else [TEMPLATE.format(template)])]
        with ExitStack() as stack:
            outputs = _outputs(checkpoint, to, stack)
            num_bytes = _write_folder(checkpoint, to, config, outputs, out)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from error
    return [f"{out}: {len(outputs)} tensors, {gib(num_bytes)}", *notes]


def _check_format(checkpoint: Checkpoint, to: str) -> None:
    model_type = checkpoint.config.get("model_type")
    if model_type not in FORMATS.values() or not checkpoint.architecture.is_built_in:
        known = " and ".join(FORMATS.values())
        raise ConfigError(f"{checkpoint.folder} has model_type {model_type!r}; the two formats are InternVL's, {known}")
    if model_type == FORMATS[to]:
        raise ConfigError(f"{checkpoint.folder} has model_type {model_type!r}, which is the format {to} already")
    try:
        shards = read_shards(checkpoint.folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if shards is not None:
        raise ConfigError(f"{checkpoint.folder} is sharded for tp {shards.tp}; convert the original checkpoint")


def _check_whole(checkpoint: Checkpoint) -> None:
    """Every tensor in its shape, as loading checks them; raises ValueError, FileNotFoundError."""
    model = build_model(checkpoint, Split())
    model.use_stored_formats(checkpoint.folder, checkpoint.quantisation, torch.float32)
    for _ in match_tensors(checkpoint.folder, model.targets(), rename=model.rename):
        pass


def _outputs(checkpoint: Checkpoint, to: str, stack: ExitStack) -> dict[str, Output]:
    """By name in the other format; `stack` keeps the files open."""
    model = build_model(checkpoint, Split())
    found = _for_hf if to == HF else _for_original
    return found(checkpoint, model, _stored(checkpoint.folder, model, stack))


def _stored(folder: Path, model: Model, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """(name, handle) of what the model uses."""
    for path in checkpoint_files(folder):
        file = stack.enter_context(safe_open(path, "pt"))
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            if model.rename(name) is not None:
                yield name, file.get_slice(name)


def _for_hf(checkpoint: Checkpoint, model: Model, stored: Iterator[tuple[str, Any]]) -> dict[str, Output]:
    found: dict[str, Output] = {}
    for name, handle in stored:
        for theirs, part in expanded(to_hf(name, model.decoder.config), handle):
            found[theirs] = Output(Kind.of(part), tuple(part.get_shape()), (part,))
    return found


def _for_original(checkpoint: Checkpoint, model: Model, stored: Iterator[tuple[str, Any]]) -> dict[str, Output]:
    """A tied head is stored as well: OpenGVLab's older code unties all."""
    pieces: dict[str, dict[int, Any]] = {}
    for name, handle in stored:
        piece = to_original(name)
        if piece is not None:
            pieces.setdefault(piece.name, {})[piece.place] = handle
    found: dict[str, Output] = {}
    for name, places in pieces.items():
        handles = tuple(places[place] for place in sorted(places))
        first, *rest = (tuple(handle.get_shape()) for handle in handles)
        shape = (first[0] + sum(other[0] for other in rest), *first[1:]) if rest else first
        found[name] = Output(Kind.of(handles[0]), shape, handles)
    if model.decoder.lm_head is None:
        found[HEAD] = found[EMBEDDING]
    return found


def _write_folder(checkpoint: Checkpoint, to: str, config: dict[str, Any], outputs: dict[str, Output], out: Path) -> int:
    groups = _groups(outputs)
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE for i in range(len(groups))]
    files = [
        TensorFile(name, {key: (outputs[key].kind, outputs[key].shape) for key in group})
        for name, group in zip(names, groups, strict=True)
    ]
    num_bytes = sum(file.num_bytes for file in files)
    check_room(out, num_bytes + sum((checkpoint.folder / path).stat().st_size for path in companion_files(checkpoint.folder)))
    from tqdm import tqdm

    with whole_or_nothing(out) as partial:
        (write_hf if to == HF else write_original)(checkpoint, partial)
        _write_json(partial / "config.json", config)
        with tqdm(desc="weights", total=num_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
            for file in files:
                _write_file(file, outputs, partial, bar.update)
        if len(files) > 1:
            weight_map = {key: file.name for file in files for key in file.starts}
            total = sum(output.num_bytes for output in outputs.values())
            _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return num_bytes


def _groups(outputs: dict[str, Output]) -> list[list[str]]:
    """The tensors of each file."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, output in outputs.items():
        if groups[-1] and size + output.num_bytes > MAX_FILE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += output.num_bytes
    return groups


def _write_file(file: TensorFile, outputs: dict[str, Output], folder: Path, progress: Callable[[int], Any]) -> None:
    with (folder / file.name).open("wb") as stream:
        progress(stream.write(file.header))
        for key in file.starts:
            file.write(stream, key, outputs[key].read())
            progress(outputs[key].num_bytes)
        stream.flush()
        os.fsync(stream.fileno())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
