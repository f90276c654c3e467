"""A safetensors file that is written tensor by tensor: its header is made first, from types and shapes alone.

safetensors' own writer wants all tensors of a file in memory.
Source of the file format: https://huggingface.co/docs/safetensors (length of the header, header as JSON, data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch


@dataclass(frozen=True, slots=True)
class Kind:
    """A stored tensor's type: torch's, and safetensors' name for it."""

    dtype: torch.dtype
    code: str

    @classmethod
    def of(cls, stored: Any) -> Kind:
        """Of a handle on a stored tensor, of which little is read."""
        return cls((stored[:0] if stored.get_shape() else stored[...]).dtype, stored.get_dtype())


class TensorFile:
    """One file to be: where each tensor begins, and the header that says so. `tensors`: type and shape by name."""

    def __init__(self, name: str, tensors: Mapping[str, tuple[Kind, Sequence[int]]]) -> None:
        self.name = name
        self.starts: dict[str, int] = {}
        entries, end = {}, 0
        for key in sorted(tensors, key=lambda key: (-tensors[key][0].dtype.itemsize, key)):  # so that each is aligned
            (kind, shape), start = tensors[key], end
            end += math.prod(shape) * kind.dtype.itemsize
            self.starts[key] = start
            entries[key] = {"dtype": kind.code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self.header) + end

    def write(self, file: BinaryIO, key: str, part: torch.Tensor) -> None:
        file.seek(len(self.header) + self.starts[key])
        file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
