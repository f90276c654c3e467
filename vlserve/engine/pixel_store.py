"""Preprocessed pictures where a rank finds them: files in shared memory that the front wrote, or tensors handed over."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlserve.engine.messages import pixel_file


class PixelStore:
    """Looks in `folders`, in order. They are mapped, not copied, and stay readable when the front removes the file."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lent: Mapping[bytes, torch.Tensor] = {}

    def lend(self, pixels: Mapping[bytes, torch.Tensor]) -> None:
        """What this process has in hand for the next step."""
        self._lent = pixels

    def open(self, digest: bytes, num_bytes: int) -> torch.Tensor:
        """The units' numbers one after another, [num_bytes] uint8; raises FileNotFoundError, OSError when refused."""
        if digest in self._lent:
            return self._lent[digest]
        path = next((folder / pixel_file(digest) for folder in self._folders if (folder / pixel_file(digest)).exists()), None)
        if path is None:
            raise FileNotFoundError(f"the pixels of a picture are gone: {pixel_file(digest)}")
        try:
            return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
        except RuntimeError:  # all that torch says
            os.close(os.open(path, os.O_RDONLY))  # fails with the system's reason, where it is one
            raise
