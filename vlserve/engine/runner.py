"""Owns a rank's model, KV cache and feature cache, and computes steps: `start`, `sample`, `finish` on rank 0, `follow` elsewhere.

In one step all ranks call the same collectives in the same order: the announcement, the embedding, the features of new
pictures, two a decoder layer, the logits, the tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import torch

from vlserve.config import EngineConfig
from vlserve.engine.batch import Announcer, EncodeTask, FeaturePiece, Listener, StepInput, describe, lay_out, make_batch
from vlserve.engine.cuda_graphs import CudaRecorder, DecodeGraphs, Recorder, UnitGraphs
from vlserve.engine.device_timer import Timings
from vlserve.engine.feature_cache import FeatureCache
from vlserve.engine.feature_encoder import FeatureEncoder
from vlserve.engine.memory import GIB, NOTHING, Planned, fit_blocks, release_leftovers, weight_bytes
from vlserve.engine.pixel_store import PixelStore
from vlserve.engine.process_group import DistributedGroup
from vlserve.engine.sampling import Drawn, Sampler
from vlserve.engine.scheduler import Chunk, Sampled
from vlserve.engine.sequence import Sequence
from vlserve.engine.warm_up import warm_up_decoder
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.types import Draw
from vlserve.kernels.upload import pinned, upload
from vlserve.kernels.with_triton import runs_triton
from vlserve.llm.decoder import DeepFeatures
from vlserve.llm.kv_cache import KVCache, block_bytes
from vlserve.models.base import Model
from vlserve.plan.footprint import LOGIT_COPIES, most_units
from vlserve.vision.pixels import Unit


@dataclass(slots=True, kw_only=True, eq=False)
class Started:
    """A step that the device has been asked for."""

    chunks: list[Chunk]
    logits: torch.Tensor | None  # [R, V], until they are sampled from
    drawn: Drawn | None = None  # what came of them


class Runner:
    """Built once. `in_use` tells which pictures' features must stay; `pixels` gives the units of those to encode.

    Args:
        planned: memory for steps, features and CUDA graphs; with 0 for graphs there are none.
        recorder: makes them; CUDA's where it is not given and the device is one.
    """

    def __init__(
        self,
        model: Model,
        *,
        config: EngineConfig,
        max_model_len: int,
        end_token_ids: frozenset[int],
        in_use: Callable[[], set[bytes]] = set,
        pixels: PixelStore | None = None,
        planned: Planned = NOTHING,
        recorder: Recorder | None = None,
    ) -> None:
        self.model, self.group = model, model.decoder.split.group
        self.device, self.dtype = model.decoder.norm.device, model.decoder.norm.dtype
        self.max_model_len, self.block_size = max_model_len, config.block_size
        self.max_num_batched_tokens, self.max_num_seqs = config.max_num_batched_tokens, config.max_num_seqs
        self.kv_dtype = config.kv_cache_dtype
        self.pixels = pixels or PixelStore([])
        model.decoder.prepare(max_model_len, self.device)
        if recorder is None and planned.graphs and self.device.type == "cuda" and self.group.can_record:
            recorder = CudaRecorder(self.device, planned.graphs)
        if not runs_triton(model.decoder.norm):  # torch's operators are planned for each step
            recorder = None
        peak_bytes = 0
        if self.device.type == "cuda":  # on the CPU a fixed share of the memory is left over
            measured = self._measure_peak(config.max_num_batched_tokens, config.max_num_seqs)
            peak_bytes = max(measured, planned.step) + planned.features
        if recorder is not None:
            peak_bytes += planned.graphs + self._cache_bytes(1)  # a block for rows of padding
        release_leftovers(self.device)
        num_blocks = fit_blocks(config, model, max_model_len, peak_bytes)
        self.num_blocks = self.group.minimum(num_blocks, "kv cache") if isinstance(self.group, DistributedGroup) else num_blocks
        self.decodes: DecodeGraphs | None = None
        self.cache = self._make_cache(self.num_blocks + (recorder is not None))
        if recorder is not None:
            limits = {"max_num_seqs": config.max_num_seqs, "max_model_len": max_model_len}
            if model.decoder.can_record:
                self.decodes = DecodeGraphs(model, self.cache, recorder, **limits, spare_block=self.num_blocks)
        self.encoder = self._make_encoder(config.ranks_per_node, recorder)
        self.features = FeatureCache(int(config.vision_cache_gib * GIB), in_use)
        self.end_token_ids = end_token_ids
        self.sampler = Sampler(end_token_ids, self.dtype)
        self.image_queries = self.image_hits = 0  # pictures
        self.encode_s = self.step_s = self.comm_s = 0.0  # seconds in `_encode`, in steps, and there in collectives
        self._timings = Timings(self.device)
        self._waiting: list[Sequence] = []  # for the pictures that this step encodes
        self._told = time.monotonic()  # when the other ranks last heard something
        self._announcer, self._listener = Announcer(), Listener()
        self._last_tokens = torch.zeros(1, dtype=torch.int64, device=self.device)  # [R], sampled last, on every rank
        self._last_rows: dict[int, int] = {}  # the sequences that they are of
        self._fixed_bytes = weight_bytes(model) | {"kv_cache": self._cache_bytes(self.num_blocks + (recorder is not None))}

    @torch.inference_mode()
    def start(self, chunks: list[Chunk]) -> Started:
        """Ask the device for a step; a sequence's last token may be one that has not been read yet."""
        with self._counted():
            missing = self._find_missing(chunks)
            step = describe(chunks, missing, self._last_rows)
            self.pixels.lend({m.digest: m.pixels for chunk in chunks for m in chunk.media if m.digest in missing})
            if isinstance(self.group, DistributedGroup):
                self.group.broadcast_message(self._announcer.step(step, chunks))
                self._told = time.monotonic()
            self._waiting = [c.sequence for c in chunks if any(media.digest in missing for media in c.media)]
            logits = self._compute(step)
            dropped = self.features.trim()
            if self.group.size > 1:  # alone it would keep them for ever: there is no message that takes them
                self._announcer.dropped(dropped)
            return Started(chunks=chunks, logits=logits)

    @torch.inference_mode()
    def sample(self, step: Started) -> None:
        """Ask for its tokens, once those of the steps before it have been taken in."""
        if step.logits is None:
            return
        with self._counted():
            sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
            step.drawn, step.logits = self.sampler.sample(step.logits, sampling), None
            self._last_tokens = self.group.broadcast(step.drawn.tokens, "tokens")
            self._last_rows = {sequence.id: row for row, sequence in enumerate(sampling) if not sequence.has_ended}

    def finish(self, step: Started) -> list[Sampled]:
        """Wait for its tokens; one result for each chunk that samples, in order."""
        with self._counted():
            sampled = [] if step.drawn is None else step.drawn.read()
            self._timings.settle()  # a picture's time is known when its first token is
            return sampled

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        begun, comm_begun = time.monotonic(), self.group.seconds
        yield
        self.step_s += time.monotonic() - begun
        self.comm_s += self.group.seconds - comm_begun

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
        for id in ids:
            self._last_rows.pop(id, None)  # a request to come may have the same id
        if self.group.size > 1:
            self._announcer.ended(ids)

    @torch.inference_mode()
    def follow(self) -> bool:
        """On a rank other than 0: take part in the next step; False once there will be none."""
        assert isinstance(self.group, DistributedGroup)
        told = self._listener.read(self.group.receive_message())
        self.features.drop(told.dropped)
        if told.step is not None:
            self._compute(told.step)
            number = sum(chunk.samples for chunk in told.step.chunks)
            if number:
                tokens = torch.empty(number, dtype=torch.int64, device=self.device)
                self._last_tokens = self.group.broadcast(tokens, "tokens")
            self._timings.settle()
        return not told.is_last

    @torch.inference_mode()
    def warm_up(self) -> None:
        """A unit on every rank through the encoder, and what the decoder and the head launch: so that no request is slow."""
        decoder = self.model.decoder
        if self.model.tower is not None:
            self.group.all_gather(self._encode_nothing([self.model.tower.smallest()]), "warm-up")
        if runs_triton(decoder.norm):
            limits = {"most_tokens": self.max_num_batched_tokens, "most_rows": self.max_num_seqs}
            warm_up_decoder(decoder, self.cache, **limits, max_model_len=self.max_model_len)
            return
        logits = decoder.logits(decoder.embed(torch.zeros(1, dtype=torch.int64, device=self.device)))
        if logits is not None:
            draw_tokens(logits, logits.argmax(-1), [Draw(row=0, temperature=1.0, top_k=1, seed=0, number=0)])

    def device_bytes(self) -> dict[str, int]:
        """Bytes by kind; on CUDA they add up to what torch has allocated. On the CPU pages that were never used count too."""
        known = self._fixed_bytes | {"vision_cache": self.features.num_bytes}
        if self.device.type != "cuda":
            return known
        # the nested statistics are what memory_allocated() reads too, without sorting a hundred entries at every step
        allocated = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["current"]
        return known | {"other": allocated - sum(known.values())}

    def _compute(self, step: StepInput) -> torch.Tensor | None:
        """Logits [R, V] of the rows that sample, on rank 0; None on the others and when no row does."""
        decoder = self.model.decoder
        rows = lay_out(step, self.block_size, decoder.num_position_axes)
        num_samples = len(rows.sample_rows)
        is_text = not step.encode and not step.pieces
        size = self.decodes.size_for(rows) if self.decodes is not None and is_text else None
        if self.decodes is not None and size is not None:
            hidden = self.decodes.run(size, rows, self._last_tokens)
            if 0 < num_samples < len(hidden):
                hidden = hidden[upload(rows.sample_rows, torch.int64, self.device)]
            return decoder.logits(hidden) if num_samples else None
        batch = make_batch(rows, self.block_size, self.device, self._last_tokens)
        x = decoder.embed(batch.ids)
        if step.encode:
            self._encode(step.encode)
        deep = self._put_features(x, batch.feature_rows, step.pieces) if step.pieces else None
        if not runs_triton(x):  # whose attention reads nothing past a sequence's end
            self.cache.clear(rows.partial_blocks)
        hidden = decoder(x, batch.positions, self.cache, batch.metadata, deep)
        return decoder.logits(hidden[batch.sample_rows]) if num_samples else None

    def _put_features(self, x: torch.Tensor, rows: torch.Tensor, pieces: list[FeaturePiece]) -> DeepFeatures | None:
        """Features take their rows' places in x [T, C]; what deeper layers take of them is returned."""
        parts = []
        for piece in pieces:
            features = self.features.get(piece.digest)
            assert features is not None, "features were encoded above or before, and nothing was dropped since"
            parts.append(features[piece.first : piece.stop])
        whole = torch.cat(parts)  # [F, L, C]
        x.index_copy_(0, rows, whole[:, 0])
        return DeepFeatures(rows, whole[:, 1:].unbind(1)) if whole.shape[1] > 1 else None

    def _encode(self, tasks: list[EncodeTask]) -> None:
        begun, waiting = self._timings.begin(), self._waiting

        def tell(seconds: float) -> None:
            self.encode_s += seconds
            for sequence in waiting:
                sequence.encode_s += seconds

        assert self.encoder is not None, "the front refuses pictures for a model without a tower"
        self.encoder.encode(tasks, self.features)
        self._timings.end(begun, tell)

    def _find_missing(self, chunks: list[Chunk]) -> Set[bytes]:
        missing = {media.digest for chunk in chunks for media in chunk.media if self.features.get(media.digest) is None}
        begun = [
            media.digest
            for chunk in chunks
            for media in chunk.sequence.media
            if chunk.start <= max(media.start, chunk.sequence.num_cached_tokens) < min(chunk.stop, media.stop)
        ]  # a picture of a request counts once, where its first token that is not in the prefix cache is computed
        found = len(begun) - len(missing & set(begun))
        self.image_hits += found
        self.image_queries += found + len(missing)
        return missing

    def _encode_nothing(self, units: list[Unit]) -> torch.Tensor:
        """The features of black units."""
        assert self.model.tower is not None
        pixels = pinned((sum(unit.num_bytes for unit in units),), torch.uint8, self.device).zero_()
        return self.model.tower.encode(pixels, units)

    def _make_encoder(self, num_local: int, recorder: Recorder | None) -> FeatureEncoder | None:
        tower, decoder = self.model.tower, self.model.decoder
        if tower is None:
            return None
        unit = tower.fixed_unit
        graphs = None if recorder is None or unit is None else UnitGraphs(tower, unit, decoder, recorder)
        return FeatureEncoder(tower, decoder, self.pixels, num_local=num_local, graphs=graphs)

    def _make_cache(self, num_blocks: int) -> KVCache:
        decoder = self.model.decoder
        return KVCache(
            decoder.cache_kinds,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self.dtype,
            device=self.device,
            kv_dtype=self.kv_dtype,
        )

    def _cache_bytes(self, num_blocks: int) -> int:
        decoder = self.model.decoder
        return num_blocks * block_bytes(decoder.cache_kinds, self.block_size, self.dtype, self.kv_dtype)

    @torch.inference_mode()
    def _measure_peak(self, num_tokens: int, max_num_seqs: int) -> int:
        """Bytes that the encoder, or a step of `num_tokens` at the end of a context, takes on CUDA beside what stays.

        What only requests bring, such as penalties and grammars, the plan knows.
        """
        num_tokens = min(num_tokens, self.max_model_len)
        num_blocks = -(-num_tokens // self.block_size)
        decoding = self._peak_of(lambda: self._try_decoder(num_tokens, num_blocks, max_num_seqs)) - self._cache_bytes(num_blocks)
        return max(decoding, self._peak_of(lambda: self._try_encoder(num_tokens)))

    def _peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _try_encoder(self, num_tokens: int) -> None:
        tower, decoder = self.model.tower, self.model.decoder
        if tower is None:
            return
        waiting = decoder.norm.new_empty(num_tokens, decoder.config.hidden_size)  # the step's embeddings
        units, unit = tower.heaviest(), tower.fixed_unit
        if unit is not None:  # dealt to the ranks, as many to each
            limits = self.max_num_batched_tokens, self.max_model_len
            units = units[: most_units(*limits, unit.num_features, self.group.size)]
        self._encode_nothing(units)
        del waiting

    def _try_decoder(self, num_tokens: int, num_blocks: int, num_rows: int) -> None:
        decoder, cache = self.model.decoder, self._make_cache(num_blocks)
        cache.clear(list(range(num_blocks)))  # which is read as if it were a context's
        places = torch.arange(num_tokens, device=self.device)
        context = torch.arange(-(-self.max_model_len // self.block_size), device=self.device) % num_blocks
        metadata = plan_attention(
            query_lens=(num_tokens,),
            context_lens=(self.max_model_len,),
            block_tables=context.unsqueeze(0),
            slots=places,
            block_size=self.block_size,
        )
        axes = places.expand(decoder.num_position_axes, -1)
        hidden = decoder(decoder.embed(torch.zeros_like(places)), axes, cache, metadata)
        logits = decoder.logits(hidden[:num_rows])
        if logits is not None:  # sampled from on this rank
            logits.new_empty(LOGIT_COPIES - 1, *logits.shape)
