"""The samples' hidden states on their way through the decoder, one layer at a time, and the layer that they are run through.

Three streams: of the calibration samples, through the rounded layers; of those held out, through the original layers and
through the rounded ones. They are on disk after each layer, so that a run can go on from there. Shapes: T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vlserve.kernels.attention import plan_attention
from vlserve.kernels.rotary.table import rotary_table
from vlserve.llm.attention import Attention
from vlserve.llm.config import DecoderConfig
from vlserve.llm.experts import Experts
from vlserve.llm.kv_cache import KeysAndValues, KVCache
from vlserve.llm.layer import DecoderLayer
from vlserve.llm.mlp import DenseMLP
from vlserve.models.base import Model
from vlserve.quantize.activation_stats import Inputs
from vlserve.quantize.calibration import Sample, is_held_out

BLOCK = 16  # tokens in a block of the KV cache
NOT_SCORED = -100


@dataclass(slots=True, kw_only=True)
class Streams:
    """All on the CPU, samples one after another."""

    lengths: list[int]  # of the calibration samples
    held_out_lengths: list[int]
    calibration: torch.Tensor  # [T, C]
    original: torch.Tensor  # [T, C]
    rounded: torch.Tensor  # [T, C]
    next_ids: torch.Tensor  # int64 [T] of what is held out: the token that comes next, NOT_SCORED where it does not count
    scores_answers: bool  # False: no answer was held out, and all text counts

    def tensors(self) -> dict[str, torch.Tensor]:
        """To be written; `read_streams` is the inverse."""
        return {
            "lengths": torch.tensor(self.lengths),
            "held_out_lengths": torch.tensor(self.held_out_lengths),
            "calibration": self.calibration,
            "original": self.original,
            "rounded": self.rounded,
            "next_ids": self.next_ids,
            "scores_answers": torch.tensor(self.scores_answers),
        }

    @property
    def longest(self) -> int:
        return max(self.lengths + self.held_out_lengths)


def read_streams(tensors: Mapping[str, torch.Tensor]) -> Streams:
    given = dict(tensors)
    lengths, held_out = given.pop("lengths").tolist(), given.pop("held_out_lengths").tolist()
    scores_answers = bool(given.pop("scores_answers"))
    return Streams(lengths=lengths, held_out_lengths=held_out, scores_answers=scores_answers, **given)


@torch.inference_mode()
def embed_samples(model: Model, samples: Sequence[Sample], progress: Callable[[], None] = lambda: None) -> Streams:
    """What the first decoder layer reads: pictures go through the vision encoder."""
    parts: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    held_out = [sample for index, sample in enumerate(samples) if is_held_out(index, len(samples))]
    for index, sample in enumerate(samples):
        x = model.decoder.embed(torch.tensor(sample.token_ids, device=model.decoder.norm.device))
        for span in sample.spans:
            assert model.tower is not None, "there are no pictures for a model without a tower"
            features = model.tower.encode(torch.from_numpy(span.pixels.data), span.pixels.units)[:, 0]
            places = [features_of(run) for run in span.runs]
            x[torch.cat(places).to(x.device)] = features
        parts[is_held_out(index, len(samples))].append(model.decoder.enter(x).cpu())
        progress()
    original = torch.cat(parts[True])
    scores_answers = any(any(sample.is_answer) for sample in held_out)
    return Streams(
        lengths=[len(part) for part in parts[False]],
        held_out_lengths=[len(part) for part in parts[True]],
        calibration=torch.cat(parts[False]),
        original=original,
        rounded=original.clone(),
        next_ids=torch.cat([_next_ids(sample, scores_answers) for sample in held_out]),
        scores_answers=scores_answers,
    )


def features_of(run: tuple[int, int]) -> torch.Tensor:
    """The places of a run of features."""
    return torch.arange(run[0], sum(run))


def _next_ids(sample: Sample, scores_answers: bool) -> torch.Tensor:
    counts = torch.tensor(sample.is_answer)
    if not scores_answers:
        counts = torch.ones_like(counts)
        for span in sample.spans:
            for run in span.runs:
                counts[features_of(run)] = False
    ids = torch.tensor(sample.token_ids).where(counts, NOT_SCORED)
    return torch.cat([ids[1:], torch.tensor([NOT_SCORED])])


class LayerRunner:
    """Runs any layer over streams, sample by sample, as the engine would in one step without a past."""

    def __init__(self, config: DecoderConfig, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device, self._dtype = device, dtype
        # scaled as by a server that allows the whole context
        self._rotary = rotary_table(config.rope, config.max_position_embeddings)[:longest].to(device)
        self._cache = KVCache(
            [KeysAndValues(num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim)],
            num_blocks=-(-longest // BLOCK),
            block_size=BLOCK,
            dtype=dtype,
            device=device,
        )

    @torch.inference_mode()
    def run(
        self, layer: DecoderLayer, x: torch.Tensor, lengths: Sequence[int], progress: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """x [T, C] on the CPU -> the layer's result [T, C] on the CPU."""
        out = torch.empty_like(x)
        for mine, target in zip(x.split(list(lengths)), out.split(list(lengths)), strict=True):
            target.copy_(self._run_one(layer, mine.to(self._device, self._dtype)))
            progress()
        return out

    def _run_one(self, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        length = len(x)
        metadata = plan_attention(
            query_lens=(length,),
            context_lens=(length,),
            block_tables=torch.arange(-(-length // BLOCK), device=self._device).unsqueeze(0),
            slots=torch.arange(length, device=self._device),
            block_size=BLOCK,
        )
        cos, sin = self._rotary[:length].unbind(1)
        added, residual = layer(x, None, (cos, sin), self._cache.layers[0], metadata)
        return added + residual


@contextmanager
def watch_inputs(layer: DecoderLayer, device: torch.device) -> Iterator[dict[str, Inputs]]:
    """What the layer's linear layers read while it runs, by the names of layer.READERS; finished at the end. Experts are none of
    them."""
    attention, mlp = layer.mixer, layer.feed_forward
    assert isinstance(attention, Attention), "source_checkpoint.py refuses decoders of other kinds"
    hidden = layer.input_layernorm.numel()
    modules: dict[str, tuple[nn.Module, int]] = {
        "qkv": (attention.qkv_proj, hidden),
        "output": (attention.o_proj, attention.sizes[0]),
    }
    if isinstance(mlp, DenseMLP):
        width = next(iter(mlp.gate_up_proj.outputs.values()))[1]
        modules |= {"gate_up": (mlp.gate_up_proj, hidden), "down": (mlp.down_proj, width)}
    found = {name: Inputs(size, device) for name, (_, size) in modules.items()}

    def hook(inputs: Inputs) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, given: inputs.add(given[0])

    handles = [module.register_forward_pre_hook(hook(found[name])) for name, (module, _) in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for inputs in found.values():
        inputs.finish()


@contextmanager
def watch_tokens(layer: DecoderLayer) -> Iterator[list[torch.Tensor]]:
    """What the layer's experts read while it runs, float32 [T, C] a sample, on the CPU; nothing of a dense MLP."""
    found: list[torch.Tensor] = []
    if not isinstance(layer.feed_forward, Experts):
        yield found
        return
    handle = layer.feed_forward.register_forward_pre_hook(lambda module, given: found.append(given[0].float().cpu()))
    try:
        yield found
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model says what comes next."""

    perplexity: float
    tokens_right: float  # share of the tokens that are its first choice
    answers_right: float  # share of the answers whose every token is: those it gives itself, word for word, when it is greedy


@torch.inference_mode()
def score(model: Model, x: torch.Tensor, next_ids: torch.Tensor, rows_at_once: int = 512) -> Score:
    """Of the tokens that count; x [T, C] is what the last layer gives, as a model with its head has it."""
    decoder, rows = model.decoder, (next_ids != NOT_SCORED).nonzero().flatten()
    total, right = torch.zeros((), dtype=torch.float64), []
    for part in rows.split(rows_at_once):
        whole = x[part].to(decoder.norm.device, decoder.norm.dtype)
        hidden = decoder.leave(whole, torch.zeros_like(whole))
        logits = decoder.logits(hidden)
        assert logits is not None
        ids = next_ids[part].to(logits.device)
        total += nn.functional.cross_entropy(logits, ids, reduction="sum").double().cpu()
        right.append((logits.argmax(-1) == ids).cpu())
    answers = answers_of(next_ids)[rows]
    whole = torch.ones(int(answers[-1]) + 1).scatter_reduce(0, answers, torch.cat(right).float(), "amin")
    return Score(float((total / len(rows)).exp()), float(torch.cat(right).float().mean()), float(whole.mean()))


def answers_of(next_ids: torch.Tensor) -> torch.Tensor:
    """Which answer each token that counts belongs to, from 0: a run of such tokens is one."""
    counts = (next_ids != NOT_SCORED).long()
    return (counts.diff(prepend=counts.new_zeros(1)) == 1).cumsum(0) - 1
