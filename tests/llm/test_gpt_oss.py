"""What GPT-OSS's published files say, and what transformers takes where they say nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlserve.kernels.rotary.table import rotary_frequencies
from vlserve.llm.config import FULL, SLIDING, ClampedSwiGLU
from vlserve.llm.config_readers import DEFAULTS, read_decoder_config
from vlserve.llm.quantisation import MXFP4, find_quantisation
from vlserve.llm.stored_names import expanded, own_names
from vlserve.llm.tensor_parallel import Group, Split

QUANTISATION = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4",
}
PUBLISHED: dict[str, Any] = {  # of the edition with 20 billion parameters
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": [SLIDING, FULL] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": QUANTISATION,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def test_the_published_config() -> None:
    config = read_decoder_config(PUBLISHED)
    assert config.layer_types == (SLIDING, FULL) * 12 and config.sliding_window == 128 and config.attention_sinks
    assert config.qkv_bias and config.output_bias and config.longest_context == 131072 == config.default_context
    experts = config.experts
    assert experts is not None
    assert (experts.num_experts, experts.top_k, experts.width, experts.unit) == (32, 4, 2880, 32)
    assert experts.norm_topk_prob and experts.router_bias and experts.bias and len(experts.layers) == 24
    assert experts.gate == ClampedSwiGLU(alpha=1.702, limit=7.0)


def test_what_is_left_out_is_as_in_transformers() -> None:
    from transformers import GptOssConfig

    theirs = GptOssConfig()
    assert {key: getattr(theirs, key) for key in DEFAULTS["gpt_oss"] if key != "rope_theta"} == {
        key: value for key, value in DEFAULTS["gpt_oss"].items() if key != "rope_theta"
    }
    config = read_decoder_config({"model_type": "gpt_oss"})
    assert list(config.layer_types) == theirs.layer_types
    saved = read_decoder_config(theirs.to_dict())
    assert saved.rope == config.rope == read_decoder_config(PUBLISHED).rope
    assert config.experts == saved.experts
    renamed = {key: value for key, value in PUBLISHED.items() if key != "num_local_experts"} | {"num_experts": 16}
    assert read_decoder_config(renamed).experts.num_experts == GptOssConfig(num_experts=16).num_local_experts == 16  # type: ignore[union-attr]


@pytest.mark.parametrize("changes", [{}, {"truncate": True}, {"factor": 4.0, "beta_fast": 16.0}], ids=str)
def test_its_rotary_frequencies_equal_transformers(changes: dict[str, Any]) -> None:
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = PUBLISHED["rope_scaling"] | changes
    theirs = GptOssConfig(rope_parameters=rope | {"rope_theta": 150000})
    want, want_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    got, factor = rotary_frequencies(read_decoder_config(PUBLISHED | {"rope_scaling": rope}).rope, 131072)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert factor == pytest.approx(want_factor, rel=1e-9)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_experts_per_tok": 33}, "num_experts_per_tok 33 is more than num_local_experts 32"),
        ({"swiglu_limit": -1}, "swiglu_limit is -1; expected a number above 0"),
        ({"layer_types": [FULL]}, "layer_types .* is not supported; expected 24 of"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder_config(PUBLISHED | changes)


def test_quantisation_covers_experts_alone() -> None:
    found = find_quantisation(PUBLISHED)
    assert found is not None and found.kind == MXFP4
    for name in ("self_attn.q_proj", "mlp.router", "mlp.experts.3.down_proj", "mlp.experts.0.gate_proj"):
        assert found.covers(f"model.layers.7.{name}") == ("experts" in name), name
    assert not find_quantisation(
        {"quantization_config": QUANTISATION | {"modules_to_not_convert": ["model.layers.1.mlp"]}}
    ).covers(  # type: ignore[union-attr]
        "model.layers.1.mlp.experts.0.down_proj"
    )
    assert found.linear_bytes(2880, 2880, 2) == 2880 * 90 * 17


class Handle:
    """As safetensors' own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return "U8"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


def test_a_tensor_of_all_experts_is_read_as_each_ones() -> None:
    """Gate and up are interleaved; where inputs come first a part is turned."""
    names = own_names(read_decoder_config(PUBLISHED | {"num_local_experts": 4, "num_experts_per_tok": 2}))
    layer = "model.layers.3.mlp."
    assert names(f"{layer}router.weight") == f"{layer}gate.weight"
    given = {
        "gate_up_proj_blocks": torch.randint(256, (4, 12, 2, 16)),
        "gate_up_proj_bias": torch.randn(4, 12),
        "gate_up_proj": torch.randn(4, 64, 12),
        "down_proj": torch.randn(4, 6, 64),
        "down_proj_scales": torch.randint(256, (4, 64, 3)),
    }
    for name, tensor in given.items():
        parts = dict(expanded(names(f"{layer}experts.{name}"), Handle(tensor)))
        assert len(parts) == (8 if "gate" in name else 4)
        for expert in range(4):
            for place, projection in enumerate(("gate", "up") if "gate" in name else ("down",)):
                (key,) = (key for key in parts if f"experts.{expert}.{projection}_proj." in key)
                part, want = parts[key], tensor[expert].T if name in ("gate_up_proj", "down_proj") else tensor[expert]
                want = want[place::2] if "gate" in name else want
                assert part.get_shape() == list(want.shape) and torch.equal(part[...], want)
                assert torch.equal(part[2:5], want[2:5]) and part[4:4].numel() == 0
                if want.ndim > 1:
                    assert torch.equal(part[1:3, 1:2], want[1:3, 1:2])
    with pytest.raises(ValueError, match="is none of 4 experts"):
        list(expanded(names(f"{layer}experts.down_proj"), Handle(torch.randn(3, 6, 64))))


def test_ranks_share_whole_groups() -> None:
    class Rank(Group):
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

    for size in (1, 2, 3, 4, 8, 16):
        spans = [Split(group=Rank(rank, size)).expert_width(2880, 32) for rank in range(size)]
        assert len({span.size for span in spans}) == 1 and not any(
            edge % 32 for span in spans for edge in (span.start, span.size)
        )
        assert sum(span.stop - span.start for span in spans) == 2880
