"""Finds a model's folder and reads its JSON files: the box's `demo`, a local path, or the Hugging Face Hub.

No torch, no weights: those are the rank's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlserve.config import EngineConfig
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.quantisation import FILES as QUANTISATION_FILES
from vlserve.llm.quantisation import Quantisation, find_quantisation
from vlserve.llm.shards import read_shards, split_flags
from vlserve.models.architecture import FILES, Architecture, Preprocessor
from vlserve.models.end_tokens import find_end_tokens
from vlserve.models.hub import why_unreachable
from vlserve.models.registry import find_architecture
from vlserve.models.settled_config import read_stored, settle
from vlserve.models.wrong_folder import check_folder, explain_file

DEMO = Path(__file__).parents[1] / "demo"
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's folder and its settings, as dictionaries; weights stay on disk."""

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    preprocessor: Preprocessor
    architecture: Architecture
    end_token_ids: frozenset[int]  # tokens that end an answer

    @property
    def quantisation(self) -> Quantisation | None:
        """How the decoder's weights are stored, None where nothing says that they are quantised; raises ValueError."""
        beside = {name: _read_json(self.folder / name, optional=True) for name in QUANTISATION_FILES}
        return find_quantisation(self.config, {name: given for name, given in beside.items() if given})

    @property
    def feature_token_ids(self) -> frozenset[int]:
        """Tokens that stand where a picture's features go; raises ModelError where config.json does not name them."""
        try:
            return frozenset(placeholder.id for placeholder in self.preprocessor.placeholders().values())
        except ValueError as error:
            raise ModelError(str(error)) from error


def find_folder(model: str, revision: str | None = None) -> Path:
    """`demo`, a folder, or `org/name` on the Hub (downloaded once); raises ModelError."""
    if model == "demo":
        return DEMO
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(explain_file(path))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f"model {model!r}: no such folder. Give demo, a folder, or a Hugging Face name such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unreachable = why_unreachable()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, local_files_only=bool(unreachable)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = unreachable or str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model {model!r}: no such folder here, and the Hugging Face Hub did not give it: {reason}") from error


def find_checkpoint(config: EngineConfig) -> Checkpoint:
    """That of `config.model`; raises ModelError."""
    return read_checkpoint(find_folder(config.model, config.revision), language_model_only=config.language_model_only)


def read_checkpoint(folder: Path, *, language_model_only: bool = False) -> Checkpoint:
    """Read config.json and its companions, and the headers of the weights; raises ModelError naming the file and key."""
    check_folder(folder)
    config = _read_json(folder / "config.json")
    architecture = find_architecture(config, language_model_only=language_model_only)
    files = {name: _read_json(folder / name, optional=True) for name in FILES}
    try:
        architecture.decoder(settle(config, architecture, None))
        preprocessor = architecture.preprocessor(config, files)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else error
        raise ModelError(f"{folder.name}: {reason}") from error
    generation = _read_json(folder / "generation_config.json", optional=True)
    return Checkpoint(
        folder=folder,
        config=settle(config, architecture, read_stored(folder)),
        generation=generation,
        end_token_ids=find_end_tokens(folder, config, generation, preprocessor.end_tokens()),
        preprocessor=preprocessor,
        architecture=architecture,
    )


def check_shards(folder: Path, config: EngineConfig) -> None:
    """Whether a folder that `vlserve shard` wrote is for this degree; raises ConfigError, and ModelError for a damaged one."""
    try:
        shards = read_shards(folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if shards is None or split_flags(shards) == split_flags(config):
        return
    written, asked = split_flags(shards), split_flags(config)
    raise ConfigError(
        f"{folder} was sharded for {written}, and this start is {asked}. Give {written}; or start from the original checkpoint, "
        f"or shard that again: vlserve shard ORIGINAL OUT {asked}"
    )


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if not path.exists():
        if optional:
            return {}
        raise ModelError(f"{path.parent}: checkpoint file missing: {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors mark UTF-8
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}; download or write it again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value
