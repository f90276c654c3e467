"""Owns a rank's model, KV cache and feature cache, and computes steps: `run` on rank 0, `follow` on the others.

In one step all ranks call the same collectives in the same order: the announcement, the features of new pictures, the
embedding, two a decoder layer, the logits, the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set

import torch

from vlserve.config import EngineConfig
from vlserve.engine.batch import Announcer, Batch, ImageTask, Listener, StepInput, describe, make_batch
from vlserve.engine.feature_cache import FeatureCache
from vlserve.engine.group import DistributedGroup
from vlserve.engine.memory import GIB, fit_blocks, release_leftovers, weight_bytes
from vlserve.engine.model import Model
from vlserve.engine.pixels import PixelStore
from vlserve.engine.sampling import Sampler
from vlserve.engine.scheduler import Chunk, Sampled
from vlserve.kernels.paged_attention import plan_attention
from vlserve.llm.kv_cache import KVCache, block_bytes
from vlserve.vision.config import TILES_AT_ONCE


class Runner:
    """Built once. `in_use` tells which pictures' features must stay; `pixels` gives the tiles of those to encode."""

    def __init__(
        self,
        model: Model,
        *,
        config: EngineConfig,
        max_model_len: int,
        end_token_ids: frozenset[int],
        in_use: Callable[[], set[bytes]] = set,
        pixels: PixelStore | None = None,
    ) -> None:
        self.model, self.group = model, model.decoder.split.group
        self.device, self.dtype = model.decoder.norm.device, model.decoder.norm.dtype
        self.max_model_len, self.block_size = max_model_len, config.block_size
        self.kv_dtype = config.kv_cache_dtype
        self._num_local = config.ranks_per_node  # ranks that share rank 0's machine
        self.pixels = pixels or PixelStore([])
        model.decoder.prepare(max_model_len, self.device)
        peak_bytes = self._measure_peak(config.max_num_batched_tokens)
        release_leftovers(self.device)
        num_blocks = fit_blocks(config, model, max_model_len, peak_bytes)
        self.num_blocks = self.group.minimum(num_blocks, "kv cache") if isinstance(self.group, DistributedGroup) else num_blocks
        self.cache = self._make_cache(self.num_blocks)
        self.features = FeatureCache(int(config.vision_cache_gib * GIB), in_use)
        self.sampler = Sampler(end_token_ids)
        self.image_queries = self.image_hits = 0  # pictures
        self.encode_s = self.step_s = self.comm_s = 0.0  # seconds in `_encode`, in `run`, and there in collectives
        self._encoding_s = 0.0  # of this step
        self._told = time.monotonic()  # when the other ranks last heard something
        self._announcer, self._listener = Announcer(), Listener()
        self._last_tokens = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._fixed_bytes = weight_bytes(model) | {"kv_cache": self._cache_bytes(self.num_blocks)}

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        """Compute a step; one result for each chunk that samples, in order."""
        begun, comm_begun = time.monotonic(), self.group.seconds
        missing = self._find_missing(chunks)
        step = describe(chunks, missing)
        self.pixels.lend({image.digest: image.pixels for chunk in chunks for image in chunk.images if image.digest in missing})
        if isinstance(self.group, DistributedGroup):
            self.group.broadcast_message(self._announcer.step(step, chunks))
            self._told = time.monotonic()
        logits = self._compute(step, make_batch(step, self.block_size, self.device))
        dropped = self.features.trim()
        if self.group.size > 1:  # alone it would keep them for ever: there is no message that takes them
            self._announcer.dropped(dropped)
        self._share_encode_time(chunks, missing)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if logits is None:
            sampled = []
        else:
            sampled = self.sampler.sample(logits, sampling)
            self._announcer.sampled(sampling)
            tokens = torch.tensor([s.token_id for s in sampled], device=self.device)
            self.group.broadcast(tokens, "tokens")
        self.step_s += time.monotonic() - begun
        self.comm_s += self.group.seconds - comm_begun
        return sampled

    def idle(self, *, is_last: bool = False) -> None:
        """Tell the other ranks that there is nothing to do, or nothing any more."""
        if isinstance(self.group, DistributedGroup):
            self.group.broadcast_message(self._announcer.idle(is_last=is_last))
            self._told = time.monotonic()

    def keep_alive(self, after_s: float) -> None:
        """The other ranks hear something when there was nothing to compute for so long, as while grammars are compiled."""
        if time.monotonic() - self._told > after_s:
            self.idle()

    def forget(self, ids: list[int]) -> None:
        """Sequences that ended."""
        self.sampler.forget(ids)
        if self.group.size > 1:
            self._announcer.ended(ids)

    @torch.inference_mode()
    def follow(self) -> bool:
        """On a rank other than 0: take part in the next step; False once there will be none."""
        assert isinstance(self.group, DistributedGroup)
        told = self._listener.read(self.group.receive_message())
        self.features.drop(told.dropped)
        if told.step is not None:
            batch = make_batch(told.step, self.block_size, self.device, self._last_tokens)
            self._compute(told.step, batch)
            if len(batch.sample_rows):
                self._last_tokens = self.group.broadcast(torch.empty_like(batch.sample_rows), "tokens")
        return not told.is_last

    @torch.inference_mode()
    def warm_up(self) -> None:
        """A tile on every rank through the encoder and one row through the head, so that the first request is not slow."""
        size = self.model.image_config.tile_size
        self.group.all_gather(self.model.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)), "warm-up")
        self.model.decoder.logits(self.model.decoder.embed(torch.zeros(1, dtype=torch.int64, device=self.device)))

    def device_bytes(self) -> dict[str, int]:
        """Bytes by kind; on CUDA they add up to what torch has allocated. On the CPU pages that were never used count too."""
        known = self._fixed_bytes | {"vision_cache": self.features.num_bytes}
        if self.device.type != "cuda":
            return known
        # the nested form is what memory_allocated() reads too, without sorting a hundred entries at every step
        allocated = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["current"]
        return known | {"other": allocated - sum(known.values())}

    def _compute(self, step: StepInput, batch: Batch) -> torch.Tensor | None:
        """Logits [R, V] of the rows that sample, on rank 0; None on the others and when no row does."""
        x = self.model.decoder.embed(batch.ids)
        if step.encode:
            self._encode(step.encode)
        for piece in step.pieces:
            features = self.features.get(piece.digest)
            assert features is not None, "features were encoded above or before, and nothing was dropped since"
            x[piece.row : piece.row + piece.stop - piece.start] = features[piece.start : piece.stop]
        self.cache.clear(batch.partial_blocks)
        hidden = self.model.decoder(x, batch.positions, self.cache, batch.metadata)
        return self.model.decoder.logits(hidden[batch.sample_rows]) if len(batch.sample_rows) else None

    def _encode(self, images: list[ImageTask]) -> None:
        """Rank r encodes tiles r, r+N, r+2N, ... of all pictures together; one all-gather brings the features to every rank."""
        begun = time.monotonic()
        num_tiles, size = sum(image.num_tiles for image in images), self.group.size
        share = -(-num_tiles // size)
        tiles = self._tiles(images)
        config = self.model.image_config
        width = self.model.decoder.config.hidden_size
        mine = torch.zeros(share, config.tokens_per_tile, width, dtype=self.dtype, device=self.device)
        if len(tiles):
            mine[: len(tiles)] = self.model.encode(tiles)
        gathered = self.group.all_gather(mine, "features")  # [rank, share, K, C]; tile t is the (t // N)th of rank t % N
        features = gathered.transpose(0, 1).flatten(0, 1)[:num_tiles]
        for image, part in zip(images, features.split([image.num_tiles for image in images]), strict=True):
            self.features.put(image.digest, part.flatten(0, 1).clone())
        if self.device.type == "cuda":  # its kernels run behind: without this only their launch is timed
            torch.cuda.synchronize(self.device)
        self._encoding_s = time.monotonic() - begun
        self.encode_s += self._encoding_s

    def _tiles(self, images: list[ImageTask]) -> torch.Tensor:
        """This rank's share of the pictures' tiles, [n, 3, S, S] uint8. On rank 0's machine everyone reads them where they lie;
        a rank elsewhere gets just its own from rank 0."""
        group, config = self.group, self.model.image_config
        if group.rank >= self._num_local:
            assert isinstance(group, DistributedGroup)
            number = len(range(group.rank, sum(image.num_tiles for image in images), group.size))
            tiles = torch.empty(number, 3, config.tile_size, config.tile_size, dtype=torch.uint8)
            return group.receive(tiles, "pixels") if number else tiles
        pictures = [self.pixels.open(image.digest, image.num_tiles, config.tile_size) for image in images]
        flat = [picture[i] for picture in pictures for i in range(len(picture))]
        for rank in range(self._num_local, min(group.size, len(flat)) if group.rank == 0 else 0):
            assert isinstance(group, DistributedGroup)
            group.send(torch.stack(flat[rank :: group.size]), rank, "pixels")
        mine = flat[group.rank :: group.size]
        return torch.stack(mine) if mine else torch.empty(0, 3, config.tile_size, config.tile_size, dtype=torch.uint8)

    def _find_missing(self, chunks: list[Chunk]) -> Set[bytes]:
        missing = {i.digest for chunk in chunks for i in chunk.images if self.features.get(i.digest) is None}
        begun = [
            image.digest
            for chunk in chunks
            for image in chunk.sequence.images
            if chunk.start <= max(image.start, chunk.sequence.num_cached_tokens) < min(chunk.stop, image.stop)
        ]  # a picture of a request counts once, where its first token that is not in the prefix cache is computed
        found = len(begun) - len(missing & set(begun))
        self.image_hits += found
        self.image_queries += found + len(missing)
        return missing

    def _share_encode_time(self, chunks: list[Chunk], missing: Set[bytes]) -> None:
        for chunk in chunks if missing else ():
            if any(image.digest in missing for image in chunk.sequence.images):
                chunk.sequence.encode_s += self._encoding_s

    def _make_cache(self, num_blocks: int) -> KVCache:
        decoder = self.model.decoder
        return KVCache(
            *(decoder.config, decoder.num_kv_heads),
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self.dtype,
            device=self.device,
            kv_dtype=self.kv_dtype,
        )

    def _cache_bytes(self, num_blocks: int) -> int:
        decoder = self.model.decoder
        return num_blocks * block_bytes(decoder.config, decoder.num_kv_heads, self.block_size, self.dtype, self.kv_dtype)

    @torch.inference_mode()
    def _measure_peak(self, num_tokens: int) -> int:
        """Bytes that the encoder, or a step of `num_tokens`, takes at its peak beside weights and caches; 0 on the CPU, where
        a fixed share of the memory is left over for it."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        size = self.model.image_config.tile_size
        self.model.encode(torch.zeros(TILES_AT_ONCE, 3, size, size, dtype=torch.uint8))
        num_tokens = min(num_tokens, self.max_model_len)
        num_blocks = -(-num_tokens // self.block_size)
        cache = self._make_cache(num_blocks)
        places = torch.arange(num_tokens, device=self.device)
        metadata = plan_attention(
            query_lens=(num_tokens,),
            context_lens=(num_tokens,),
            block_tables=torch.arange(num_blocks, device=self.device).unsqueeze(0),
            slots=places,
            block_size=self.block_size,
        )
        hidden = self.model.decoder(self.model.decoder.embed(torch.zeros_like(places)), places, cache, metadata)
        self.model.decoder.logits(hidden[:1])
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return max(0, peak - self._cache_bytes(num_blocks))
