"""The tensor-parallel plan: which degrees a model can be cut by, and what each rank then holds.

From config.json and, where they are there, the weights' headers: no GPU, no torch. The engine asks `check_tp` before it loads
anything; the command `vlserve plan` shows the whole plan. Sizes are read in model_shape.py, degrees checked in divisibility.py,
bytes computed in footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.config import EngineConfig
from vlserve.errors import ConfigError, ModelError
from vlserve.plan import footprint
from vlserve.plan.cuda_graph_sizes import graph_bytes
from vlserve.plan.divisibility import (
    Problem,
    check_degree,
    check_experts,
    check_tp,
    indivisible,
    legal_degrees,
    refusal_text,
    too_few_experts,
)
from vlserve.plan.footprint import Cut, Shard, Step
from vlserve.plan.model_shape import Request, read_model_shape, request_tokens

if TYPE_CHECKING:
    from vlserve.llm.config import DecoderConfig
    from vlserve.models.settled_config import Stored
    from vlserve.plan.model_shape import DecoderShape

__all__ = ["Cut", "Plan", "Problem", "RankPlan", "Request", "check_tp", "choose_dtype", "choose_max_model_len", "make_plan"]

GIB = 2**30
DEFAULTS = EngineConfig()
ONE_PICTURE = Request()
DRIVER_BYTES = 2**29  # what CUDA's context and libraries take of a device: an allowance, for only the device tells
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """Bytes on one rank; `total_bytes` is all but the KV cache, which takes the rest of the device."""

    rank: int
    vision_bytes: int
    decoder_bytes: int
    embedding_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    feature_bytes: int  # of pictures, kept across requests and new in a step
    graph_bytes: int  # set aside for CUDA graphs
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan for one degree, or with `tp` None for all: then `degrees` has one for each and `ranks` is empty.

    `ok`: it divides, and where device memory was given one request of max_model_len fits. `supported`: vlserve can serve
    the model today, and `unsupported` why not. `reason` says why not, for either, a
    line each. `legal_tp` need nothing, `legal_tp_replicated` need
    replicate_kv_heads. `max_concurrent` is what the KV cache holds of requests of `request_tokens`.
    """

    ok: bool
    supported: bool
    unsupported: tuple[str, ...]
    reason: str | None
    tp: int | None
    legal_tp: tuple[int, ...]
    legal_tp_replicated: tuple[int, ...]
    problems: tuple[Problem, ...]
    kv_tokens: int | None
    max_concurrent: int | None
    ranks: tuple[RankPlan, ...]
    cuts: tuple[Cut, ...]
    source: str
    model_type: str
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    device_memory: float | None  # GiB
    gpu_memory_utilization: float
    request_tokens: int
    image_tokens: int  # of one picture
    notes: tuple[str, ...]
    degrees: tuple[Plan, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it; `degrees` only where all degrees were asked for."""
        document = asdict(self)
        if self.tp is not None:
            del document["degrees"]
        else:
            document["degrees"] = [degree.to_dict() for degree in self.degrees]
        return document


def make_plan(
    config: Mapping[str, Any],
    *,
    tp: int | None,
    source: str = "config.json",
    stored: Stored | None = None,
    faults: tuple[str, ...] = (),
    dtype: str = DEFAULTS.dtype,
    lm_head_bits: int = DEFAULTS.lm_head_bits,
    kv_cache_dtype: str = DEFAULTS.kv_cache_dtype,
    device_memory: float | None = None,
    gpu_memory_utilization: float = DEFAULTS.gpu_memory_utilization,
    max_model_len: int | None = None,
    replicate_kv_heads: bool = False,
    max_num_seqs: int = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: int = DEFAULTS.max_num_batched_tokens,
    block_size: int = DEFAULTS.block_size,
    enforce_eager: bool = DEFAULTS.enforce_eager,
    vision_cache_gib: float = DEFAULTS.vision_cache_gib,
    language_model_only: bool = DEFAULTS.language_model_only,
    expert_parallel: bool = DEFAULTS.expert_parallel,
    request: Request = ONE_PICTURE,
) -> Plan:
    """Plan for `tp` ranks, or for every degree that works.

    Args:
        config: the whole config.json. source: its path, for messages.
        stored: the weights' headers (`read_stored`), which tell a type and a head that config.json does not.
        faults: why the files beside config.json cannot be loaded; they go into `unsupported`.
        device_memory: GiB of one device; without it nothing is said of tokens and requests.
        replicate_kv_heads: also degrees above the number of KV heads, each of which then lies on several ranks.

    Raises:
        ConfigError: an argument is wrong. ModelError: config.json lacks a size that a plan needs.
        A degree that does not work is no error here but a plan that is not ok.
    """
    options = EngineConfig(  # checks them
        dtype=dtype,
        lm_head_bits=lm_head_bits,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        enforce_eager=enforce_eager,
        vision_cache_gib=vision_cache_gib,
        language_model_only=language_model_only,
        expert_parallel=expert_parallel,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    if tp is not None:
        check_degree(tp)
    if device_memory is not None and not (device_memory > 0 and math.isfinite(device_memory)):
        raise ConfigError(f"device_memory is {device_memory!r}; expected GiB above 0")
    planner = _Planner(config, stored, faults, source, options, device_memory, replicate_kv_heads, request)
    return planner.all_degrees() if tp is None else planner.plan(tp)


class _Planner:
    """One config and one set of options; plans for any degree."""

    def __init__(
        self,
        given: Mapping[str, Any],
        stored: Stored | None,
        faults: tuple[str, ...],
        source: str,
        options: EngineConfig,
        device_memory: float | None,
        replicate: bool,
        request: Request,
    ) -> None:
        self.source, self.options, self.device_memory, self.replicate = source, options, device_memory, replicate
        config, refused = _settled(given, stored)
        self.shape = read_model_shape(config, language_model_only=options.language_model_only)
        self.shape = replace(self.shape, reasons=self.shape.reasons + refused + faults)
        if options.dtype == "auto" and config.get("dtype") is None:
            note = "config.json states no dtype, and no weights are beside it: counted in float32; --dtype says another one"
            self.shape = replace(self.shape, notes=(*self.shape.notes, note))
        self.dtype = choose_dtype(config, options.dtype)
        self.max_model_len = self._choose_length()
        self.step = Step.of(options, ITEMSIZES[self.dtype], self.max_model_len)
        self.vision_bytes, self.shape = footprint.vision_bytes(self.shape, config, self.step.itemsize)
        self.image_tokens, self.request_tokens = request_tokens(self.shape, request)
        self.legal, self.legal_replicated = legal_degrees(self.shape.decoder)
        if options.expert_parallel:
            number = self.shape.decoder.num_experts
            check_experts(number, source)
            self.legal, self.legal_replicated = (
                tuple(tp for tp in degrees if tp <= number) for degrees in (self.legal, self.legal_replicated)
            )

    def all_degrees(self) -> Plan:
        plans = tuple(map(self.plan, self.legal + self.legal_replicated * self.replicate))
        if any(plan.ok for plan in plans):
            return replace(self._empty(), ok=True, degrees=plans)
        last = plans[-1]
        return replace(self._empty(), problems=last.problems, reason=f"no degree fits: {last.reason}", degrees=plans)

    def plan(self, tp: int) -> Plan:
        decoder = self.shape.decoder
        problems = indivisible(decoder, tp, self.replicate, self.source)
        if problems:
            reason = self._reason(refusal_text(decoder, problems, self.replicate))
            return replace(self._empty(), tp=tp, problems=problems, reason=reason)
        by_expert, number = self.options.expert_parallel, decoder.num_experts
        if by_expert and number < tp:
            problem = Problem(dimension="num_experts", size=number, tp=tp, source=self.source)
            reason = self._reason(too_few_experts(number, tp, self.source))
            return replace(self._empty(), tp=tp, problems=(problem,), reason=reason)
        ranks = self._ranks(tp)
        cuts = footprint.cuts(decoder, footprint.shard(decoder, tp, expert_parallel=by_expert), tp, by_expert=by_expert)
        plan = replace(self._empty(), ok=True, tp=tp, ranks=ranks, cuts=cuts)
        if self.device_memory is None:
            return plan
        tokens = self._kv_tokens(ranks)
        held = tokens // self._in_blocks(self.request_tokens)
        plan = replace(plan, kv_tokens=tokens, max_concurrent=held if self.request_tokens <= self.max_model_len else 0)
        if tokens >= self.max_model_len:
            return plan
        problem, reason = self._too_small(tp, ranks, tokens)
        return replace(plan, ok=False, problems=(problem,), reason=self._reason(reason))

    def _empty(self) -> Plan:
        return Plan(
            ok=False,
            supported=not self.shape.reasons,
            unsupported=self.shape.reasons,
            reason=self._reason(None),
            tp=None,
            legal_tp=self.legal,
            legal_tp_replicated=self.legal_replicated,
            problems=(),
            kv_tokens=None,
            max_concurrent=None,
            ranks=(),
            cuts=(),
            source=self.source,
            model_type=self.shape.decoder.model_type,
            dtype=self.dtype,
            kv_cache_dtype=self.options.kv_cache_dtype,
            max_model_len=self.max_model_len,
            device_memory=self.device_memory,
            gpu_memory_utilization=self.options.gpu_memory_utilization,
            request_tokens=self.request_tokens,
            image_tokens=self.image_tokens,
            notes=self.shape.notes,
        )

    def _reason(self, refusal: str | None) -> str | None:
        unsupported = "\n  ".join(("vlserve cannot serve this model yet:", *self.shape.reasons)) if self.shape.reasons else None
        return "\n".join(filter(None, (refusal, unsupported))) or None

    def _ranks(self, tp: int) -> tuple[RankPlan, ...]:
        by_expert = self.options.expert_parallel
        return tuple(
            self._rank(footprint.shard(self.shape.decoder, tp, rank, expert_parallel=by_expert), rank) for rank in range(tp)
        )

    def _rank(self, part: Shard, rank: int) -> RankPlan:
        decoder, itemsize = self.shape.decoder, self.step.itemsize
        layers = footprint.decoder_bytes(decoder, part, itemsize)
        embeddings = footprint.embedding_bytes(decoder, part, itemsize, self.options.lm_head_bits)
        activations = footprint.activation_bytes(self.shape, part, self.step, is_first=rank == 0)
        features = footprint.feature_bytes(self.shape, self.step)
        graphs = 0 if self.options.enforce_eager else graph_bytes(self.shape, part, self.step)
        return RankPlan(
            rank=rank,
            vision_bytes=self.vision_bytes,
            decoder_bytes=layers,
            embedding_bytes=embeddings,
            kv_bytes_per_token=footprint.kv_bytes_per_token(decoder, part, self.step),
            activation_bytes=activations,
            feature_bytes=features,
            graph_bytes=graphs,
            total_bytes=self.vision_bytes + layers + embeddings + activations + features + graphs,
        )

    def _budget(self) -> float:
        """Bytes of a device that may be used."""
        assert self.device_memory is not None
        return self.device_memory * GIB * self.options.gpu_memory_utilization - DRIVER_BYTES

    def _kv_tokens(self, ranks: tuple[RankPlan, ...]) -> int:
        """Tokens in whole blocks, for max_num_seqs full contexts at most; all ranks hold the same, so the fullest decides."""
        size, spare = self.options.block_size, not self.options.enforce_eager  # a block for graphs' rows of padding
        fitting = (int((self._budget() - r.total_bytes) // (r.kv_bytes_per_token * size)) - spare for r in ranks)
        return min(self.options.max_num_seqs * self._in_blocks(self.max_model_len), max(0, min(fitting)) * size)

    def _fits(self, tp: int) -> bool:
        return self._kv_tokens(self._ranks(tp)) >= self.max_model_len

    def _in_blocks(self, tokens: int) -> int:
        size = self.options.block_size
        return -(-tokens // size) * size

    def _too_small(self, tp: int, ranks: tuple[RankPlan, ...], tokens: int) -> tuple[Problem, str]:
        assert self.device_memory is not None
        rank = max(ranks, key=lambda r: r.total_bytes)
        cache = self._in_blocks(self.max_model_len) * rank.kv_bytes_per_token
        share = f"{self.device_memory:g} GiB x {self.options.gpu_memory_utilization:g}, less {DRIVER_BYTES / GIB:g} GiB for the "
        share += f"driver, gives {self._budget() / GIB:.2f} GiB"
        text = f"tp={tp} does not fit: rank {rank.rank} needs {rank.total_bytes / GIB:.2f} GiB without KV cache"
        text += f" and {cache / GIB:.2f} GiB of it for one request of max_model_len {self.max_model_len}; device memory {share}"
        fitting = [str(n) for n in self.legal if self._fits(n)]
        ways = [f"set --max-model-len to {tokens} or less"] if tokens else []
        ways += (
            [f"take --tp {' or '.join(fitting)}"]
            if fitting
            else ["take larger devices, a 16-bit --dtype or --kv-cache-dtype int8"]
        )
        text += f". Way out: {', or '.join(ways)}"
        if tokens:
            problem = Problem(dimension="max_model_len", size=self.max_model_len, tp=tp, source=self._length_source())
        else:
            problem = Problem(dimension="device_memory", size=self.device_memory, tp=tp, source="--device-memory")
        return problem, text

    def _choose_length(self) -> int:
        return choose_max_model_len(self.options.max_model_len, self.shape.decoder)

    def _length_source(self) -> str:
        if self.options.max_model_len is not None:
            return "--max-model-len"
        section = self.shape.decoder.section
        return f"{self.source}, {section + '.' if section else ''}max_position_embeddings"


def _settled(config: Mapping[str, Any], stored: Stored | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """As the engine reads it, and why the weights cannot be served."""
    from vlserve.models.registry import find_architecture  # entry points; the command line's flags need none of it
    from vlserve.models.settled_config import settle

    try:
        architecture = find_architecture(config)
    except ModelError:
        architecture = None
    try:
        return settle(config, architecture, stored), ()
    except ModelError as error:
        return settle(config, architecture, None), (str(error),)


def choose_dtype(config: Mapping[str, Any], name: str) -> str:
    """What the engine computes in: `name`, or for auto what a settled config.json has; raises ModelError for another type."""
    if name == "auto":
        name = str(config.get("dtype") or "float32")
    if name not in ITEMSIZES:
        raise ModelError(f"config.json's dtype {name!r} is not supported; give dtype={', '.join(ITEMSIZES)}")
    return name


def choose_max_model_len(given: int | None, decoder: DecoderShape | DecoderConfig) -> int:
    """Tokens of prompt and answer, for `max_model_len` as given. Raises ConfigError, ModelError."""
    default, longest = decoder.default_context, decoder.longest_context
    if given is None and default is None:
        raise ModelError("config.json has no max_position_embeddings; give --max-model-len")
    if given is not None and longest is not None and given > longest:
        raise ConfigError(
            f"max_model_len {given} is more than the checkpoint's limit, {decoder.limit_text}. Give {longest} or less, or "
            "rope_scaling in config.json, within text_config where it has one, if the model's page says so"
        )
    return given or default or 1
