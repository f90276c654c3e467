"""Rotary embedding turns pairs of channels, with transformers' frequencies. What comes before attention: test_triton.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels.errors import DTYPES, TOLERANCE, rms_ratio
from vlserve.kernels.rope import RopeConfig
from vlserve.kernels.rotary import rotary
from vlserve.kernels.rotary.reference import rotary_ref
from vlserve.kernels.rotary.table import rotary_frequencies, rotary_table


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


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cos is \(2, 3\)"):
        rotary(torch.zeros(2, 1, 8), torch.zeros(2, 3), torch.zeros(2, 3))


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
        {"rope_type": "longrope", "factor": 4.0, "short_factor": (1.0, 1.25) * 16, "long_factor": (1.5, 40.0) * 16},
    ],
    ids=lambda s: s["rope_type"],
)
@pytest.mark.parametrize("length", (64, 2048, 5000))
def test_frequencies_equal_transformers(scaling: dict[str, Any], length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = scaling["rope_type"]
    original = 2048
    parameters = {"rope_theta": 50000.0, **{key: list(of) if isinstance(of, tuple) else of for key, of in scaling.items()}}
    if kind in ("llama3", "yarn", "longrope"):
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
    ours = RopeConfig(head_dim=64, theta=50000.0, original_max_positions=original, **scaling)
    got, got_factor = rotary_frequencies(ours, length)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert math.isclose(got_factor, factor, rel_tol=1e-9)


def test_an_unknown_rope_type_is_named() -> None:
    with pytest.raises(ValueError, match="rope_type 'proportional' is not supported"):
        RopeConfig(head_dim=64, rope_type="proportional")


def test_channels_that_are_not_turned_keep_their_value() -> None:
    """The attention factor is of those that are turned alone."""
    factors: dict[str, Any] = {"short_factor": (1.0,) * 3, "long_factor": (2.0,) * 3, "factor": 4.0, "original_max_positions": 16}
    config = RopeConfig(head_dim=8, rotary_dim=6, rope_type="longrope", **factors)
    table = rotary_table(config, 20)
    assert table.shape == (20, 2, 4) and bool((table[:, 0, 3] == 1).all()) and bool((table[:, 1, 3] == 0).all())
    assert math.isclose(float(table[0, 0, 0]), math.sqrt(1 + math.log(4) / math.log(16)), rel_tol=1e-6)
