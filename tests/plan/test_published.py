"""Every published model by its config.json: that it is served, its degrees, its bytes, and how many tokens fit."""

from __future__ import annotations

import pytest

from tests.published import PUBLISHED, Published
from vlserve.errors import ConfigError
from vlserve.models.registry import find_architecture
from vlserve.plan.tp_plan import DRIVER_BYTES, GIB, check_tp, make_plan

MODELS = pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)


@MODELS
def test_a_published_config_is_served_at_its_degrees(model: Published) -> None:
    config = model.config
    assert find_architecture(config).decoder(config).model_type == model.decoder
    plan = make_plan(config, tp=None)
    assert plan.supported and plan.ok and plan.legal_tp == model.degrees, plan.reason
    assert len(plan.notes) == ("quantization_config" in model.llm)
    for tp in (3, 4, 8, 16):
        if tp in model.degrees:
            check_tp(config, tp)
        else:
            with pytest.raises(ConfigError, match=f"is not divisible by {tp}") as refused:
                check_tp(config, tp)
            assert ("The vision encoder" in str(refused.value)) == ("vision_config" in config)


@MODELS
def test_weights_come_to_the_published_size(model: Published) -> None:
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    sections = {"llm_config": {key: value for key, value in model.llm.items() if key != "quantization_config"}}
    (rank,) = make_plan(config | (sections if "llm_config" in config else {}), tp=1, dtype="bfloat16").ranks
    numbers = (rank.vision_bytes + rank.decoder_bytes + rank.embedding_bytes) / 2
    assert numbers / 1e9 == pytest.approx(model.billions, rel=0.005)


@MODELS
def test_keys_values_and_what_fits(model: Published) -> None:
    llm = model.llm
    dim = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
    for tp in (1, model.degrees[-1]):
        plan = make_plan(model.config, tp=tp, device_memory=80)
        each = 2 * llm["num_hidden_layers"] * llm["num_key_value_heads"] * dim * 2 // tp
        assert {rank.kv_bytes_per_token for rank in plan.ranks} == {each}
        assert plan.kv_tokens is not None
        left = int(80 * GIB * plan.gpu_memory_utilization) - DRIVER_BYTES - max(rank.total_bytes for rank in plan.ranks)
        most = 64 * plan.max_model_len  # of 64 requests
        assert plan.kv_tokens == min(most, max(0, left // (16 * each) - 1) * 16)
    if not plan.ok:  # the largest needs more cards than it has key-value heads
        assert "241B" in model.name and make_plan(model.config, tp=16, replicate_kv_heads=True, device_memory=80).ok
