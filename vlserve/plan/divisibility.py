"""Which tensor-parallel degrees divide a model's heads, and the refusal of those that do not. No torch, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlserve.errors import ConfigError
from vlserve.plan.model_shape import DecoderShape, read_decoder_shape

ENCODER_IS_FREE = "The vision encoder is replicated, whole on every rank, and sets no constraint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a plan is not ok: a size of config.json that does not divide, or memory that is too small."""

    dimension: str  # config.json's key, or desc_act, or device_memory (GiB) or max_model_len (tokens)
    size: float
    tp: int
    source: str  # the file and section, or the option, that the size came from


def check_tp(
    config: Mapping[str, Any],
    tp: int,
    *,
    replicate_kv_heads: bool = False,
    expert_parallel: bool = False,
    source: str = "config.json",
) -> None:
    """Refuse a degree that the model cannot be cut by, before anything is loaded.

    Raises:
        ConfigError: tp is no whole number of 1 or more, or does not divide the heads; the message names each size that
        fails, where it came from, and the degrees that work. Or `expert_parallel` is asked of a model without experts, or with
        fewer than ranks. ModelError: config.json lacks the sizes.
    """
    check_degree(tp)
    if expert_parallel:
        _check_experts(read_decoder_shape(config).num_experts, tp, source)
    if tp == 1:
        return  # nothing is cut
    decoder = read_decoder_shape(config)
    problems = indivisible(decoder, tp, replicate_kv_heads, source)
    if problems:
        raise ConfigError(refusal_text(decoder, problems, replicate_kv_heads))


def legal_degrees(decoder: DecoderShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Degrees that divide query and KV heads, and those above that need the KV heads replicated; both ascending."""
    if _is_reordered(decoder):
        return (1,), ()
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    plain = tuple(n for n in range(1, heads + 1) if heads % n == 0 and kv_heads % n == 0)
    replicated = tuple(n for n in range(kv_heads + 1, heads + 1) if heads % n == 0 and n % kv_heads == 0)
    return plain, replicated


def check_degree(tp: Any) -> None:
    """Raises ConfigError unless tp is a whole number of 1 or more."""
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise ConfigError(f"tp is {tp!r}; expected a whole number of 1 or more")


def indivisible(decoder: DecoderShape, tp: int, replicate: bool, source: str) -> tuple[Problem, ...]:
    """A problem for each size that the degree does not divide."""
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    where = f"{source}, {decoder.section}" if decoder.section else source
    is_copied = replicate and tp > kv_heads and tp % kv_heads == 0
    failing = {"num_attention_heads": heads} if heads % tp else {}
    if kv_heads % tp and not is_copied:
        failing["num_key_value_heads"] = kv_heads
    if tp > 1 and _is_reordered(decoder):
        failing["desc_act"] = 1
    return tuple(Problem(dimension=name, size=size, tp=tp, source=where) for name, size in failing.items())


def refusal_text(decoder: DecoderShape, problems: tuple[Problem, ...], replicate: bool) -> str:
    """What to say of a degree with these problems."""
    plain, replicated = legal_degrees(decoder)
    tp, where = problems[0].tp, problems[0].source
    divided = [p for p in problems if p.dimension != "desc_act"]
    sizes = " and ".join(f"{p.dimension} {p.size} is not divisible by {tp}" for p in divided)
    if len(divided) < len(problems):
        assert decoder.quantisation is not None
        reordered = f"the groups of {decoder.quantisation.where} are not of neighbouring inputs (desc_act or actorder)"
        sizes = f"{sizes}, and {reordered}" if sizes else reordered
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    text = f"tp={tp} does not work: {sizes} ({where}: {heads} query heads, {kv_heads} KV heads). "
    text += f"Degrees that work: {_listed(plain)}"
    if replicated:
        text += f"; {'also' if replicate else 'with --replicate-kv-heads also'} {_listed(replicated)}"
    return f"{text}. {ENCODER_IS_FREE}"


def _check_experts(number: int, tp: int, source: str) -> None:
    if not number:
        raise ConfigError(f"expert_parallel is on, but the model has no experts ({source}); leave --expert-parallel away")
    if number < tp:
        raise ConfigError(
            f"tp={tp} does not work with expert_parallel: the model has {number} experts ({source}), and each rank needs one or "
            f"more. Leave --expert-parallel away, and each rank has a part of every expert; or take --tp {number} or less"
        )


def _is_reordered(decoder: DecoderShape) -> bool:
    """Groups of inputs that are spread over a layer cannot be shared out."""
    return decoder.quantisation is not None and decoder.quantisation.reordered


def _listed(degrees: tuple[int, ...]) -> str:
    return ", ".join(map(str, degrees))
