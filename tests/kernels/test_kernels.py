"""Each operation equals its definition, in awkward sizes; the definitions equal formulas or transformers in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vlserve.kernels.attention import paged_attention, plan_attention
from vlserve.kernels.attention.reference import paged_attention_ref
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.gate.reference import silu_mul_ref
from vlserve.kernels.kv_cache import store_kv
from vlserve.kernels.kv_cache.reference import store_kv_ref
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks
from vlserve.kernels.norms import add_rms_norm, rms_norm
from vlserve.kernels.norms.reference import add_rms_norm_ref, rms_norm_ref
from vlserve.kernels.rope import RopeConfig
from vlserve.kernels.rotary import rotary
from vlserve.kernels.rotary.reference import rotary_ref
from vlserve.kernels.rotary.table import rotary_frequencies, rotary_table

SIZES = (1, 7, 63, 129)
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error over that of the value."""
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-12))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SIZES)
def test_rms_norm_equals_its_formula(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    d = x.double()
    want = weight.double() * d / (d.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert rms_ratio(rms_norm(x, weight, 1e-6), want) < TOLERANCE[dtype]
    assert rms_ratio(rms_norm_ref(x, weight, 1e-6), want) < TOLERANCE[dtype]
    got, want_pair = add_rms_norm(x, residual, weight, 1e-6), add_rms_norm_ref(x, residual, weight, 1e-6)
    assert torch.equal(got[1], x + residual) and rms_ratio(got[0], want_pair[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", SIZES)
def test_silu_mul_equals_its_formula(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * width).to(dtype)
    gate, up = x.double().chunk(2, -1)
    want = gate / (1 + (-gate).exp()) * up
    assert rms_ratio(silu_mul(x), want) < TOLERANCE[dtype]
    assert rms_ratio(silu_mul_ref(x), want) < TOLERANCE[dtype]


def test_wrong_shapes_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="weight is \\(4,\\).*5 channels"):
        rms_norm(torch.zeros(2, 5), torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match="last dimension is 5"):
        silu_mul(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="do not fit a cache"):
        store_kv(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), *[torch.zeros(2, 4, 2, 4)] * 2, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cos is \(2, 3\)"):
        rotary(torch.zeros(2, 1, 8), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (2, 64, 80, 128))
def test_rotary_turns_pairs_of_channels(dim: int, dtype: torch.dtype) -> None:
    config = RopeConfig(head_dim=dim)
    cos, sin = rotary_table(config, 40).unbind(1)
    x = torch.randn(40, 3, dim).to(dtype)
    pairs = torch.complex(x.double()[..., : dim // 2], x.double()[..., dim // 2 :])
    angles = torch.outer(torch.arange(40).double(), config.theta ** (-torch.arange(0, dim, 2).double() / dim))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    want = torch.cat((turned.real, turned.imag), -1)
    assert rms_ratio(rotary(x, cos, sin), want) < TOLERANCE[dtype]
    assert rms_ratio(rotary_ref(x, cos, sin), want) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
    ],
    ids=lambda s: s["rope_type"],
)
@pytest.mark.parametrize("length", (64, 2048, 5000))
def test_frequencies_equal_transformers(scaling: dict[str, float | str], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = scaling["rope_type"]
    original = 2048
    parameters = {"rope_theta": 50000.0, **scaling}
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = original
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192 if kind != "dynamic" else original,
        rope_parameters=parameters,
    )
    if kind == "default":
        want, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    ours = RopeConfig(head_dim=64, theta=50000.0, original_max_positions=original, **scaling)  # type: ignore[arg-type]
    got, got_factor = rotary_frequencies(ours, length)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert math.isclose(got_factor, factor, rel_tol=1e-9)


def test_an_unknown_rope_type_is_named() -> None:
    with pytest.raises(ValueError, match="rope_type 'longrope' is not supported"):
        RopeConfig(head_dim=64, rope_type="longrope")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype | None) -> Blocks:
    if kind is None:
        return torch.full(shape, float("nan"), dtype=dtype)
    return QuantizedBlocks(torch.full(shape, 0x7F, dtype=kind), torch.full(shape[:-1], float("nan"), dtype=torch.bfloat16))


def tensors(blocks: Blocks) -> tuple[torch.Tensor, ...]:
    return (blocks.codes, blocks.scales) if isinstance(blocks, QuantizedBlocks) else (blocks,)


def paged(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype | None = None,
) -> tuple[torch.Tensor, Blocks, Blocks, AttentionMetadata, list[tuple[torch.Tensor, ...]]]:
    """A cache (of codes where there is a `kind`) with scattered blocks, those of nobody full of NaN, and the contiguous
    tensors behind it."""
    counts = [-(-n // size) for n in context_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks).tolist()
    keys, values = (poisoned((num_blocks, size, kv_heads, dim), dtype, kind) for _ in range(2))
    tables, slots, plain, queries = [], [], [], []
    for query_len, context_len, count in zip(query_lens, context_lens, counts, strict=True):
        blocks, order = order[:count], order[count:]
        k, v, q = (
            torch.randn(n, h, dim).to(dtype) for n, h in ((context_len, kv_heads), (context_len, kv_heads), (query_len, heads))
        )
        places = torch.tensor([blocks[p // size] * size + p % size for p in range(context_len)])
        for tensor in (*tensors(keys), *tensors(values)):
            tensor[blocks] = 0
        store_kv(k, v, keys, values, places)
        slots += places[context_len - query_len :].tolist()
        tables.append(blocks + blocks[-1:] * (max(counts) - count))
        plain.append((q, k, v))
        queries.append(q)
    metadata = plan_attention(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=torch.tensor(tables),
        slots=torch.tensor(slots),
        block_size=size,
    )
    return torch.cat(queries), keys, values, metadata, plain


MIXES = [
    ((1,), (1,)),
    ((1, 1, 1), (1, 63, 129)),
    ((1, 1, 1, 1, 1), (33, 60, 17, 49, 64)),
    ((7,), (7,)),
    ((5,), (129,)),
    ((1, 7, 1, 63, 2), (63, 7, 1, 129, 2)),
    ((3, 1), (64, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 4, 8), (6, 2, 64), (14, 2, 80), (8, 1, 128)])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("size", (16, 5))
def test_paged_attention_equals_contiguous(
    mix: tuple[tuple[int, ...], tuple[int, ...]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int
) -> None:
    query, keys, values, metadata, plain = paged(*mix, heads=heads, kv_heads=kv_heads, dim=dim, size=size, dtype=dtype)
    want = []
    for q, k, v in plain:  # float64, contiguous, written out
        k, v = (t.double().repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * dim**-0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        want.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
    for operation in (paged_attention, paged_attention_ref):
        got = operation(query, keys, values, metadata, dim**-0.5)
        assert not got.isnan().any()
        assert rms_ratio(got, torch.cat(want)) < TOLERANCE[dtype], operation.__name__


def test_store_kv_equals_its_definition_and_touches_nothing_else() -> None:
    for dtype in DTYPES:
        key, value = torch.randn(9, 2, 4).to(dtype), torch.randn(9, 2, 4).to(dtype)
        slots = torch.randperm(40)[:9]
        caches = [torch.full((8, 5, 2, 4), 7.0, dtype=dtype) for _ in range(4)]
        store_kv(key, value, caches[0], caches[1], slots)
        store_kv_ref(key, value, caches[2], caches[3], slots)
        assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
        assert int((caches[0] == 7.0).all(-1).all(-1).sum()) == 31


def test_a_context_shorter_than_its_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 0 has 3 query tokens in a context of 2"):
        plan_attention(
            query_lens=(3,),
            context_lens=(2,),
            block_tables=torch.zeros(1, 1, dtype=torch.int64),
            slots=torch.zeros(3),
            block_size=4,
        )
