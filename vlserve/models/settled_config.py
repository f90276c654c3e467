"""What config.json leaves open or says against the weights, decided: dtype, a tied head, text_config's model_type. No torch.

The rules are transformers': a head that is stored counts, whatever the flags say; `dtype` is the outer one, then the text's,
then that of the tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlserve.errors import ModelError
from vlserve.llm.config_readers import is_tied
from vlserve.llm.shards import read_shards
from vlserve.llm.stored_files import StoredTensor, checkpoint_files, read_headers
from vlserve.models.architecture import Architecture, Config

SECTIONS = ("text_config", "llm_config")  # the second is OpenGVLab's internvl_chat
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors' names
EMBEDDING, HEAD = ("embed_tokens.weight", "tok_embeddings.weight"), ("lm_head.weight", "output.weight")  # InternLM2's second
TIED = "tie_word_embeddings"
AT_ONCE = 2**20  # bytes

Stored = Mapping[str, StoredTensor]


def read_stored(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint's files, by their names there; of a sharded folder, rank 0's. Raises ModelError."""
    try:
        shards = read_shards(folder)
        return read_headers(checkpoint_files(folder) if shards is None else shards.files(folder, 0))
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error


def settle(config: Config, architecture: Architecture | None, stored: Stored | None) -> dict[str, Any]:
    """A whole config.json with `dtype`, both `tie_word_embeddings` and text_config's `model_type`, as far as they can be known.

    Args:
        stored: the tensors; None where config.json is all there is. A model in whose files no head is found, though they have an
            embedding, is refused where config.json says that it is not tied: ModelError.
    """
    settled = dict(config)
    section = next((name for name in SECTIONS if isinstance(config.get(name), Mapping)), None)
    text = dict(config[section]) if section else settled
    if architecture is not None and text.get("model_type") is None and architecture.text_model_type:
        text["model_type"] = architecture.text_model_type
    dtype = _dtype(config, text, stored)
    if dtype is not None:
        settled["dtype"] = dtype
    text[TIED] = settled[TIED] = _is_tied(config, text, stored, is_built_in=architecture is not None and architecture.is_built_in)
    if section:
        settled[section] = text
    return settled


def _dtype(config: Config, text: Config, stored: Stored | None) -> Any:
    given = (place.get(key) for place in (config, text) for key in ("dtype", "torch_dtype"))
    stated = next((value for value in given if value not in (None, "auto")), None)
    if stated is not None or stored is None:
        return stated.removeprefix("torch.") if isinstance(stated, str) else stated
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        if tensor.code in DTYPES:
            numbers[DTYPES[tensor.code]] += tensor.stop - tensor.start
    return max(numbers, key=numbers.__getitem__, default=None)  # scales and a few norms may have another type than the rest


def _is_tied(config: Config, text: Config, stored: Stored | None, *, is_built_in: bool) -> bool:
    embedding = _find(stored, EMBEDDING)
    if stored is None or embedding is None:  # or another family's names
        return is_tied(config, text)
    head = _find(stored, HEAD)
    flag = config.get(TIED)
    if head is not None:
        return flag is not False and _are_equal(stored[head], stored[embedding])
    if flag is False and is_built_in:
        raise ModelError(
            f"weights missing: {HEAD[0]}. config.json says {TIED} false, and the weights have no head. If it is the embedding, "
            f'set "{TIED}": true at the top level of config.json; a model that was made for embeddings generates no text; else '
            "download the weights again"
        )
    return flag is not False


def _find(stored: Stored | None, endings: tuple[str, ...]) -> str | None:
    longer = tuple(f".{ending}" for ending in endings)
    return next((name for name in stored or () if name in endings or name.endswith(longer)), None)


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """To the byte; usually the first piece tells."""
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            size = min(left, AT_ONCE)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True
