"""Pictures' tiles where a rank finds them: files in shared memory that the front wrote, or tensors handed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlserve.engine.messages import pixel_file


class PixelStore:
    """Looks in `folders`, in order. Tiles are mapped, not copied, and stay readable when the front removes the file."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lent: Mapping[bytes, torch.Tensor] = {}

    def lend(self, tiles: Mapping[bytes, torch.Tensor]) -> None:
        """What this process has in hand for the next step."""
        self._lent = tiles

    def open(self, digest: bytes, num_tiles: int, tile_size: int) -> torch.Tensor:
        """Tiles [num_tiles, 3, tile_size, tile_size] uint8; raises FileNotFoundError."""
        if digest in self._lent:
            return self._lent[digest]
        path = next((folder / pixel_file(digest) for folder in self._folders if (folder / pixel_file(digest)).exists()), None)
        if path is None:
            raise FileNotFoundError(f"the tiles of a picture are gone: {pixel_file(digest)}")
        size = num_tiles * 3 * tile_size * tile_size
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).view(num_tiles, 3, tile_size, tile_size)
