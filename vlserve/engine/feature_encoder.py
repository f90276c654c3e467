"""Pictures to features on all ranks: each encodes its share of a step's tiles, and all get the whole."""

from __future__ import annotations

import torch

from vlserve.engine.batch import ImageTask
from vlserve.engine.cuda_graphs import TileGraphs
from vlserve.engine.feature_cache import FeatureCache
from vlserve.engine.pixel_store import PixelStore
from vlserve.engine.process_group import DistributedGroup
from vlserve.kernels.upload import pinned
from vlserve.models.base import Model


class TileEncoder:
    """Rank r encodes tiles r, r+N, r+2N, ... of all pictures together; one all-gather brings the features to every rank.

    Args:
        num_local: ranks that share rank 0's machine. graphs: for a few tiles, where there are any.
    """

    def __init__(self, model: Model, pixels: PixelStore, *, num_local: int, graphs: TileGraphs | None = None) -> None:
        self._model, self._pixels, self._num_local, self.graphs = model, pixels, num_local, graphs
        self._group = model.decoder.split.group

    def encode(self, images: list[ImageTask], features: FeatureCache) -> None:
        """Put the pictures' features into the cache."""
        num_tiles, size = sum(image.num_tiles for image in images), self._group.size
        share = -(-num_tiles // size)
        tiles, norm = self._tiles(images), self._model.decoder.norm
        mine = norm.new_zeros(share, self._model.image_config.tokens_per_tile, self._model.decoder.config.hidden_size)
        if len(tiles):
            mine[: len(tiles)] = self._model.encode(tiles) if self.graphs is None else self.graphs.encode(tiles)
        gathered = self._group.all_gather(mine, "features")  # [rank, share, K, C]; tile t is the (t // N)th of rank t % N
        whole = gathered.transpose(0, 1).flatten(0, 1)[:num_tiles]
        for image, part in zip(images, whole.split([image.num_tiles for image in images]), strict=True):
            features.put(image.digest, part.flatten(0, 1).clone())

    def _tiles(self, images: list[ImageTask]) -> torch.Tensor:
        """This rank's share of the pictures' tiles, [n, 3, S, S] uint8, ready to be sent to the device. On rank 0's machine
        everyone reads them where they lie; a rank elsewhere gets just its own from rank 0."""
        group, config, device = self._group, self._model.image_config, self._model.decoder.norm.device
        number = len(range(group.rank, sum(image.num_tiles for image in images), group.size))
        tiles = pinned((number, 3, config.tile_size, config.tile_size), torch.uint8, device)
        if group.rank >= self._num_local:
            assert isinstance(group, DistributedGroup)
            return group.receive(tiles, "pixels") if number else tiles
        pictures = [self._pixels.open(image.digest, image.num_tiles, config.tile_size) for image in images]
        flat = [picture[i] for picture in pictures for i in range(len(picture))]
        for rank in range(self._num_local, min(group.size, len(flat)) if group.rank == 0 else 0):
            assert isinstance(group, DistributedGroup)
            group.send(torch.stack(flat[rank :: group.size]), rank, "pixels")
        return torch.stack(flat[group.rank :: group.size], out=tiles) if number else tiles
