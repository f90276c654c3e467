"""The plan's bytes are those of the real modules: weights to the byte, activations as a CUDA device that is not there counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_qwen_vl_config import PUBLISHED as QWEN_VL
from tests.rehearsal.cuda import H100
from tests.rehearsal.memory import rehearsed
from vlserve.config import KV_DTYPES
from vlserve.engine.memory import weight_bytes
from vlserve.errors import ConfigError
from vlserve.kernels.attention import plan_attention
from vlserve.llm.decoder import Decoder
from vlserve.llm.kv_cache import KVCache, block_bytes
from vlserve.llm.shard_writer import OfflineGroup
from vlserve.llm.tensor_parallel import Split
from vlserve.models import internvl, registry
from vlserve.models.base import Model
from vlserve.models.qwen_vl import QwenPreprocessor
from vlserve.models.tiles import TilePreprocessor
from vlserve.plan.footprint import FLOAT32, Step, _part_bytes, shard
from vlserve.plan.model_shape import read_decoder_shape
from vlserve.plan.tp_plan import make_plan

ENCODERS = {
    "layer_norm": {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False},
    "rms_norm": {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True},
}
MIXTURE = {"head_dim": 24, "num_experts": 7, "num_experts_per_tok": 6, "moe_intermediate_size": 250}  # the fullest moment
DECODERS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None},
    "mistral with windows": {"model_type": "mistral", "sliding_window": 40},
    "phi3 of parts": {"model_type": "phi3", "partial_rotary_factor": 0.75},
    "qwen3_moe": {"model_type": "qwen3_moe", **MIXTURE},
    "qwen3_moe with dense layers": {"model_type": "qwen3_moe", **MIXTURE, "mlp_only_layers": [1]},
    "gpt_oss": {"model_type": "gpt_oss", "head_dim": 24, "num_local_experts": 7, "num_experts_per_tok": 4},
}
MIXTURES = [name for name in DECODERS if name.startswith(("qwen3_moe", "gpt_oss"))]


WHOLE = Split()
ROUNDING = 40 * 512  # bytes of small tensors


def config(encoder: str = "layer_norm", decoder: str = "qwen2", **text: Any) -> dict[str, Any]:
    vision = {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 5}
    sizes = {"vocab_size": 1001, "hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return {
        "model_type": "internvl",
        "vision_config": {**vision, **ENCODERS[encoder], "image_size": 56, "patch_size": 7},
        "text_config": {**sizes, **heads, **DECODERS[decoder], **text},
    }


def build(settings: dict[str, Any], split: Split = WHOLE) -> Model:
    return internvl.build(settings, internvl.preprocessor(settings, {}), split)


def num_bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_weights_are_those_of_the_modules(encoder: str, decoder: str) -> None:
    settings = config(encoder, decoder)
    with torch.device("meta"):
        model = build(settings)
        model.decoder.finish()
    rank = make_plan(settings, tp=1).ranks[0]
    assert model.tower is not None and rank.vision_bytes == num_bytes(model.tower)
    held = weight_bytes(model)
    assert (rank.decoder_bytes, rank.embedding_bytes) == (held["decoder"], held["embedding"])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tp,replicate", [(2, False), (6, True)])
def test_a_rank_holds_its_rows_and_columns(decoder: str, tp: int, replicate: bool) -> None:
    settings = config(decoder=decoder)
    plan = make_plan(settings, tp=tp, replicate_kv_heads=replicate)
    for rank in plan.ranks:
        with torch.device("meta"):
            model = build(settings, Split(group=OfflineGroup(rank.rank, tp), replicate_kv_heads=replicate))
            model.decoder.finish()
        held = weight_bytes(model)
        assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(held.values())


@pytest.mark.parametrize("decoder", MIXTURES)
def test_a_rank_holds_its_experts(decoder: str) -> None:
    """Of seven, two ranks have three and four."""
    settings = config(decoder=decoder)
    plan = make_plan(settings, tp=2, expert_parallel=True)
    for rank in plan.ranks:
        with torch.device("meta"):
            model = build(settings, Split(group=OfflineGroup(rank.rank, 2), expert_parallel=True))
            model.decoder.finish()
        held = weight_bytes(model)
        assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(held.values())
    assert plan.ranks[0].decoder_bytes < plan.ranks[1].decoder_bytes
    sizes = {cut.dimension: (cut.size, cut.per_rank, cut.padding) for cut in plan.cuts}
    assert sizes["num_experts"] == (7, 4, 0) and "moe_intermediate_size" not in sizes
    assert ("intermediate_size" in sizes) == ("dense" in decoder)


def test_shares_of_experts_are_checked() -> None:
    with pytest.raises(ConfigError, match="expert_parallel is on, but the model has no experts"):
        make_plan(config(), tp=None, expert_parallel=True)
    few = config(decoder="qwen3_moe", num_key_value_heads=6, num_experts=3)
    assert make_plan(few, tp=None, expert_parallel=True).legal_tp == (1, 2, 3) and make_plan(few, tp=6).ok
    plan = make_plan(few, tp=6, expert_parallel=True)
    assert not plan.ok and (plan.reason or "").startswith("tp=6 does not work with expert_parallel: the model has 3 experts")
    assert [(p.dimension, p.size, p.tp) for p in plan.problems] == [("num_experts", 3, 6)]


def kv_cache(decoder: Decoder, num_blocks: int, kv_dtype: str, dtype: torch.dtype, device: str = "cpu") -> KVCache:
    sizes = {"num_blocks": num_blocks, "block_size": 16}
    place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device), "kv_dtype": kv_dtype}
    return KVCache(decoder.cache_kinds, **sizes, **place)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_the_caches(dtype: torch.dtype, kv_dtype: str) -> None:
    settings = config(decoder="qwen3")
    with torch.device("meta"):
        decoder = build(settings).decoder
    cache = kv_cache(decoder, 3, kv_dtype, dtype, "meta")
    held = sum(t.nbytes for layer in cache.layers for t in layer)
    assert held == 3 * block_bytes(decoder.cache_kinds, 16, dtype, kv_dtype)
    plan = make_plan(settings, tp=1, dtype=str(dtype).removeprefix("torch."), kv_cache_dtype=kv_dtype)
    assert plan.kv_cache_dtype == kv_dtype and plan.ranks[0].kv_bytes_per_token * 3 * 16 == held


def planned(settings: dict[str, Any], **options: Any) -> int:
    """The first rank's activations without the rotary table, which is there before a step."""
    plan = make_plan(settings, tp=1, **options)
    text = settings["text_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return plan.ranks[0].activation_bytes - plan.max_model_len * head_dim * FLOAT32


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoders_peak(encoder: str) -> None:
    """On a CUDA device that is not there, as all peaks here."""
    settings = config(encoder)
    with torch.device("meta"):
        model = build(settings).to(torch.bfloat16)
    tokens = 8
    with rehearsed(H100) as card, torch.inference_mode():
        model.to_empty(device=torch.device("cuda", 0))
        assert model.tower is not None
        units = model.tower.heaviest()
        model.tower.encode(torch.zeros(units[0].num_bytes, dtype=torch.uint8), units[:1])  # mean and deviation are there
        memory = card.memory()
        before = memory.peak = memory.now
        waiting = model.decoder.embed(torch.zeros(tokens, dtype=torch.int64, device="cuda"))
        model.tower.encode(torch.zeros(sum(unit.num_bytes for unit in units), dtype=torch.uint8), units)
        del waiting
        peak = memory.peak - before
    length = sum(unit.num_features for unit in units)  # so that a step may have as many
    plan = planned(settings, dtype="bfloat16", max_num_batched_tokens=tokens, max_model_len=length, max_num_seqs=1)
    assert peak <= plan + ROUNDING and plan <= 1.02 * peak
    fewer = planned(settings, dtype="bfloat16", max_num_batched_tokens=tokens, max_model_len=length // 4, max_num_seqs=1)
    assert fewer < plan / 3


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("length", [128, 4096])
def test_a_decoders_peak(decoder: str, length: int, kv_dtype: str) -> None:
    """A chunk at the end of a context of `length`."""
    tokens = 128
    settings = config(decoder=decoder)
    with torch.device("meta"):
        model = build(settings).to(torch.bfloat16).decoder
    with rehearsed(H100) as card, torch.inference_mode():
        device = torch.device("cuda", 0)
        model.to_empty(device=device)
        model.finish()
        model.prepare(length, device)
        cache = kv_cache(model, length // 16, kv_dtype, torch.bfloat16, "cuda:0")
        memory = card.memory()
        before = memory.peak = memory.now
        positions = torch.arange(length - tokens, length, device=device)
        tables = torch.arange(length // 16, device=device)[None]
        metadata = plan_attention(
            query_lens=(tokens,), context_lens=(length,), block_tables=tables, slots=positions, block_size=16
        )
        x = model.embed(torch.zeros(tokens, dtype=torch.int64, device=device))
        model.logits(model(x, positions, cache, metadata)[-1:])
        peak = memory.peak - before
    no_pictures = settings | {"vision_config": None}
    options = {"dtype": "bfloat16", "kv_cache_dtype": kv_dtype, "max_num_batched_tokens": tokens, "max_model_len": length}
    plan = planned(no_pictures, **options, max_num_seqs=1)
    parts = _part_bytes(read_decoder_shape(settings), shard(read_decoder_shape(settings), 1), step(tokens, length))
    assert peak <= plan + ROUNDING and plan - parts <= 1.02 * peak, (peak, plan, parts)


def step(tokens: int, length: int) -> Step:
    sizes = {"max_model_len": length, "max_num_seqs": 1, "max_num_batched_tokens": tokens, "block_size": 16}
    return Step(itemsize=2, **sizes)


@pytest.mark.parametrize("name", [name for name in QWEN_VL if name != "Qwen2-VL-7B-Instruct"])
def test_an_encoder_of_pictures_of_any_size(name: str) -> None:
    """Weights to the byte; the peak with the largest picture that the files allow, and with small ones."""
    settings = QWEN_VL[name]
    family = registry.find_architecture(settings)
    for most in (16384, 4):
        front = family.preprocessor(settings, {})
        assert isinstance(front, QwenPreprocessor)
        front = replace(front, image=replace(front.image, min_pixels=1, max_pixels=most * front.image.factor**2))
        with torch.device("meta"):
            tower = family.build(settings, front, WHOLE).to(torch.bfloat16).tower
        assert tower is not None and family.sizes is not None
        with rehearsed(H100) as card, torch.inference_mode():
            tower.to_empty(device=torch.device("cuda", 0))
            units = tower.heaviest()
            pixels = torch.zeros(sum(unit.num_bytes for unit in units), dtype=torch.uint8)
            tower.encode(pixels, units)
            memory = card.memory()
            before = memory.peak = memory.now
            tower.encode(pixels, units)
            peak = memory.peak - before
        told = family.sizes(settings, front, 2)
        assert told.weights == num_bytes(tower)
        assert peak <= told.peak + ROUNDING and (most < 100 or told.peak <= 1.02 * peak)


def test_a_packages_encoder_is_counted_by_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples/plugin_model")
    point = EntryPoint("llava", "vlserve_llava:LLAVA", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = config() | {"model_type": "llava", "vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    settings["vision_config"] = vision | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}
    plan = make_plan(settings, tp=2)
    model_class = sys.modules["vlserve_llava.model"].Llava
    preprocessor = registry.find_architecture(settings).preprocessor(settings, {})
    assert isinstance(preprocessor, TilePreprocessor)
    with torch.device("meta"):
        model = model_class(settings, preprocessor.image, Split())
    assert plan.ok and plan.supported and plan.image_tokens == 16
    assert plan.ranks[1].vision_bytes == num_bytes(model.tower)
    broken = make_plan(settings | {"vision_config": settings["vision_config"] | {"num_attention_heads": 3}}, tp=2)
    assert broken.ok and not broken.supported and "cannot build it" in (broken.reason or "")
