"""The folder OUT: what is under way is in a work folder inside it, and config.json comes last, so that what is not whole
is no checkpoint to anybody. A run that was broken off goes on from what is in the work folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlserve.errors import ConfigError
from vlserve.models.companion_files import CODE, COMPANIONS

WORK, ASKED, STATE, CLEARED, DONE, LOCK = ".quantize-work", "asked", "state.safetensors", "cleared", "done", "lock"
REPLACED = ("*.safetensors", *COMPANIONS, CODE)
CONFIG, REPORT, INDEX = "config.json", "report.json", "model.safetensors.index.json"


class Output:
    """Locks OUT while it lives. Raises ConfigError when OUT may not be written to.

    Args:
        asked: everything that changes the files, as JSON; work of others is not gone on with.
        force: forget work that is under way, and replace the checkpoint that is in OUT.
    """

    def __init__(self, out: Path, model: Path, asked: Mapping[str, Any], *, force: bool) -> None:
        self.out = out.expanduser().resolve()
        self.work = self.out / WORK
        if self.out == model.resolve():
            raise ConfigError(f"{out} is the model's own folder; give another one")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"{out} exists and is no folder; give a new or an empty one")
        if not self.out.parent.is_dir():
            raise ConfigError(f"{out}: there is no folder {self.out.parent}; create it first")
        present = sorted(path.name for path in self.out.iterdir() if path.name != WORK) if self.out.exists() else []
        is_begun = self.is_begun
        if present and not is_begun and not force:
            raise ConfigError(f"{out} is not empty ({present[0]}); give a new or an empty folder, or --force to replace it")
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            if force:
                self._forget()
                is_begun = False
            if not is_begun:
                replaced = [str(path.relative_to(self.out)) for pattern in REPLACED for path in sorted(self.out.glob(pattern))]
                self._write_json(ASKED, {"asked": asked, "replaced": replaced})
            elif (self.work / ASKED).exists():  # else it was done, and being cleared away
                self._check_asked(asked)
        except BaseException:
            self.close()
            raise

    @property
    def is_done(self) -> bool:
        return (self.work / DONE).exists()

    @property
    def is_begun(self) -> bool:
        """Whether there is work to go on with."""
        return any((self.work / name).exists() for name in (STATE, DONE))

    def close(self) -> None:
        """Unlock; where nothing was done that is worth keeping, nothing is left."""
        if self.work.exists() and not self.is_begun:
            shutil.rmtree(self.work)
            with contextlib.suppress(OSError):  # not empty
                self.out.rmdir()
        os.close(self._file)

    def layer_file(self, index: int) -> Path:
        return self.work / f"layer-{index:05}.safetensors"

    def write_layer(self, index: int, tensors: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        write_tensors(self.layer_file(index), tensors)
        self._write_json(f"layer-{index:05}.report", report)

    def layer_report(self, index: int) -> dict[str, Any]:
        return read_json(self.work / f"layer-{index:05}.report")

    def write_state(self, tensors: Mapping[str, torch.Tensor], num_done: int) -> None:
        """What the next layer needs; `num_done` layers are written."""
        write_tensors(self.work / STATE, {**tensors, "num_done": torch.tensor(num_done)})

    def read_state(self) -> tuple[dict[str, torch.Tensor], int] | None:
        """None before the first state."""
        if not (self.work / STATE).exists():
            return None
        tensors = load_file(self.work / STATE)
        return tensors, int(tensors.pop("num_done"))

    def finish(
        self, shards: list[Path], folder: Path, copied: list[Path], config: Mapping[str, Any], report: Mapping[str, Any]
    ) -> None:
        """Put everything in its place: shards of the work folder under their last names, an index, copies of the files
        `copied` within `folder`, config.json."""
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = self._index(shards, names)
        copies = {"~".join(path.parts): path for path in copied if str(path) not in (CONFIG, REPORT, INDEX)}
        for name, path in copies.items():
            shutil.copyfile(folder / path, self.work / name)
        self._write_json(INDEX, index)
        self._write_json(REPORT, report)
        self._write_json(CONFIG, config)
        moved = [(self.work / INDEX, Path(INDEX)), (self.work / REPORT, Path(REPORT))]
        moved += [(self.work / name, path) for name, path in copies.items()]
        self._remove_replaced()
        for path, place in [*zip(shards, map(Path, names), strict=True), *moved]:
            if path.exists():  # else an earlier run moved it
                (self.out / place).parent.mkdir(exist_ok=True)
                path.replace(self.out / place)
        (self.work / CONFIG).replace(self.out / CONFIG)
        (self.work / DONE).touch()

    def remove_work(self) -> None:
        for path in list(self.work.iterdir()):
            if path.name not in (ASKED, DONE):
                path.unlink()
        for name in (ASKED, DONE):
            (self.work / name).unlink(missing_ok=True)
        self.work.rmdir()

    def _index(self, shards: list[Path], names: list[str]) -> dict[str, Any]:
        weight_map, total = {}, 0
        for path, name in zip(shards, names, strict=True):
            for tensor, entry in read_header(path if path.exists() else self.out / name).items():
                weight_map[tensor] = name
                start, stop = entry["data_offsets"]
                total += stop - start
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def _lock(self) -> None:
        self._file = os.open(self.work / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ConfigError(
                f"{self.out}: another vlserve quantize is writing there; wait for it, or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _forget(self) -> None:
        for path in list(self.work.iterdir()):
            if path.name != LOCK:
                path.unlink()

    def _check_asked(self, asked: Mapping[str, Any]) -> None:
        before = read_json(self.work / ASKED)["asked"]
        for key in sorted({*before, *asked}):
            if before.get(key) != asked.get(key):
                raise ConfigError(
                    f"{self.out} has unfinished work, begun with {key} {before.get(key)!r}, and this is {asked.get(key)!r}; "
                    "give the same to go on with it, --force to start afresh, or another folder"
                )

    def _remove_replaced(self) -> None:
        """What was in OUT when it was forced: weights and all that is copied; other people's files stay."""
        if (self.work / CLEARED).exists():  # by an earlier run, and what is there now is new
            return
        for name in read_json(self.work / ASKED)["replaced"]:
            (self.out / name).unlink(missing_ok=True)
        (self.work / CLEARED).touch()

    def _write_json(self, name: str, document: Mapping[str, Any]) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        temporary = self.work / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.work / name)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whole or not at all, also when the power fails."""
    temporary = path.with_name(path.name + ".part")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors lets only the owner read
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk among others
        raise OSError(str(error)) from error
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.chmod(mode)
    temporary.replace(path)


def read_header(path: Path) -> dict[str, Any]:
    """A safetensors file's entries by name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header


def read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
