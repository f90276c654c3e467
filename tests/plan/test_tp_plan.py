"""The plan: degrees of the published models, refusals that help, memory, and the command that prints it all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_main import vlserve
from tests.test_structure import loaded_by
from vlserve.config import EngineConfig
from vlserve.errors import ConfigError, ModelError
from vlserve.plan.tp_plan import DRIVER_BYTES, GIB, Plan, Request, check_tp, make_plan

SMALL_ENCODER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE_ENCODER = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}


def text(
    model_type: str, heads: int, kv_heads: int, hidden: int, ffn: int, layers: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


def internvl(text_config: dict[str, Any], encoder: dict[str, Any] = SMALL_ENCODER) -> dict[str, Any]:
    """As transformers saves it."""
    is_large = encoder is LARGE_ENCODER
    norms = {"attention_bias": not is_large, "use_qk_norm": is_large, "norm_type": "rms_norm" if is_large else "layer_norm"}
    vision = {**encoder, **norms, "image_size": [448, 448], "patch_size": [14, 14]}
    return {"model_type": "internvl", "dtype": "bfloat16", "text_config": text_config, "vision_config": vision}


def internvl_chat(llm_config: dict[str, Any], encoder: dict[str, Any] = LARGE_ENCODER) -> dict[str, Any]:
    """As OpenGVLab saves it."""
    is_large = encoder is LARGE_ENCODER
    norms = {"qkv_bias": not is_large, "qk_normalization": is_large, "norm_type": "rms_norm" if is_large else "layer_norm"}
    outer = {"model_type": "internvl_chat", "torch_dtype": "bfloat16", "downsample_ratio": 0.5, "max_dynamic_patch": 12}
    more = {"dynamic_image_size": True, "use_thumbnail": True, "force_image_size": 448}
    more |= {"ps_version": "v2", "select_layer": -1, "template": "internvl2_5"}
    vision = {**encoder, **norms, "model_type": "intern_vit_6b", "image_size": 448, "patch_size": 14}
    return {**outer, **more, "llm_config": llm_config, "vision_config": vision}


QWEN_32B = text("qwen2", 40, 8, 5120, 27648, 64, 151674)
QWEN_05B = text("qwen2", 14, 2, 896, 4864, 24, 151655)
PUBLISHED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "InternVL3-38B-hf": (internvl(QWEN_32B, LARGE_ENCODER), [1, 2, 4, 8]),
    "InternVL3-38B": (internvl_chat(QWEN_32B), [1, 2, 4, 8]),
    "InternVL2_5-38B": (internvl_chat(QWEN_32B), [1, 2, 4, 8]),
    "InternVL2-26B": (internvl_chat(text("internlm2", 48, 8, 6144, 16384, 48, 92553, bias=False)), [1, 2, 4, 8]),
    "InternVL2-40B": (internvl_chat(text("llama", 56, 8, 7168, 20480, 60, 64007)), [1, 2, 4, 8]),
    "InternVL3-78B-hf": (internvl(text("qwen2", 64, 8, 8192, 29568, 80, 151674), LARGE_ENCODER), [1, 2, 4, 8]),
    "InternVL3-8B-hf": (internvl(text("qwen2", 28, 4, 3584, 18944, 28, 151674)), [1, 2, 4]),
    "InternVL2-1B": (internvl_chat(QWEN_05B, SMALL_ENCODER), [1, 2]),
    "InternVL3-1B-hf": (internvl(QWEN_05B | {"vocab_size": 151674}), [1, 2]),
    "InternVL3-9B": (
        internvl_chat(text("internlm3", 32, 2, 4096, 10240, 48, 128512, head_dim=128, qkv_bias=False, bias=False), SMALL_ENCODER),
        [1, 2],
    ),
    "InternVL3-14B-hf": (internvl(text("qwen2", 40, 8, 5120, 13824, 48, 151674)), [1, 2, 4, 8]),
    "18 heads, 6 KV heads": (internvl(text("llama", 18, 6, 1152, 3072, 4, 32000)), [1, 2, 3, 6]),
}
ONE_B, BIG = PUBLISHED["InternVL3-1B-hf"][0], PUBLISHED["InternVL3-38B-hf"][0]
WEIGHTS_GIB = {  # all parameters in 16 bits, from the published sizes in billions: 38.4, 25.5, 40.1, 78.4, 0.94
    "InternVL3-38B-hf": 71.5,
    "InternVL2-26B": 47.5,
    "InternVL2-40B": 74.7,
    "InternVL3-78B-hf": 146.0,
    "InternVL2-1B": 1.75,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_degrees_of_the_published_models(name: str) -> None:
    config, degrees = PUBLISHED[name]
    plan = make_plan(config, tp=None)
    assert list(plan.legal_tp) == degrees and [p.tp for p in plan.degrees] == degrees and plan.ok
    assert plan.supported and not plan.notes, (plan.reason, plan.notes)
    for tp in range(1, 20):
        one = make_plan(config, tp=tp)
        assert one.ok == (tp in degrees) and len(one.ranks) == (tp if one.ok else 0)
        if tp in degrees:
            check_tp(config, tp)
        else:
            assert one.reason is not None
            with pytest.raises(ConfigError) as refused:
                check_tp(config, tp)
            assert one.reason.startswith(str(refused.value))


@pytest.mark.parametrize("name", WEIGHTS_GIB)
def test_weights_come_to_the_published_size(name: str) -> None:
    rank = make_plan(PUBLISHED[name][0], tp=1).ranks[0]
    assert (rank.total_bytes - rank.activation_bytes - rank.feature_bytes - rank.graph_bytes) / GIB == pytest.approx(
        WEIGHTS_GIB[name], rel=0.02
    )


def test_a_refusal_names_all_that_fails_and_the_way_out() -> None:
    plan = make_plan(BIG, tp=3, source="models/38B/config.json")
    failing = [(p.dimension, p.size, p.tp, p.source) for p in plan.problems]
    where = "models/38B/config.json, text_config"
    assert failing == [("num_attention_heads", 40, 3, where), ("num_key_value_heads", 8, 3, where)]
    for part in ("num_attention_heads 40", "num_key_value_heads 8", "1, 2, 4, 8", "vision encoder is replicated", where):
        assert plan.reason is not None and part in plan.reason
    only_kv = make_plan(BIG, tp=5)
    assert [p.dimension for p in only_kv.problems] == ["num_key_value_heads"]
    assert make_plan(PUBLISHED["InternVL2-26B"][0], tp=3).problems[0].source == "config.json, llm_config"


def test_kv_heads_are_replicated_only_when_asked_for() -> None:
    assert make_plan(ONE_B, tp=None).legal_tp_replicated == (14,)
    with pytest.raises(ConfigError, match="with --replicate-kv-heads also 14"):
        check_tp(ONE_B, 14)
    check_tp(ONE_B, 14, replicate_kv_heads=True)
    for replicate in (False, True):
        assert not make_plan(ONE_B, tp=4, replicate_kv_heads=replicate).ok
        with pytest.raises(ConfigError, match="num_attention_heads 14 is not divisible by 4"):
            check_tp(ONE_B, 4, replicate_kv_heads=replicate)
    plan = make_plan(ONE_B, tp=14, replicate_kv_heads=True)
    kv = next(cut for cut in plan.cuts if cut.dimension == "num_key_value_heads")
    assert (kv.per_rank, kv.copies, kv.padding) == (1, 7, 0) and plan.ok
    assert plan.ranks[0].kv_bytes_per_token == 2 * 24 * 1 * 64 * 2  # as at tp 2: no more is saved
    assert [p.tp for p in make_plan(ONE_B, tp=None, replicate_kv_heads=True).degrees] == [1, 2, 14]
    assert make_plan(PUBLISHED["InternVL3-9B"][0], tp=None).legal_tp_replicated == (4, 8, 16, 32)


@pytest.mark.parametrize("tp", [0, -1, True, 2.0, "2", 10**30])
def test_a_degree_is_a_whole_number(tp: Any) -> None:
    with pytest.raises(ConfigError, match="tp"):
        check_tp(BIG, tp)


def test_vocabulary_and_feed_forward_are_padded() -> None:
    cuts = {cut.dimension: cut for cut in make_plan(BIG, tp=8).cuts}
    assert (cuts["vocab_size"].per_rank, cuts["vocab_size"].padding) == (18960, 6)
    assert cuts["intermediate_size"].padding == 0 and cuts["num_attention_heads"].per_rank == 5
    odd = internvl(text("llama", 18, 6, 1152, 3070, 4, 32000))
    cuts = {cut.dimension: cut for cut in make_plan(odd, tp=6).cuts}
    assert (cuts["intermediate_size"].per_rank, cuts["intermediate_size"].padding) == (512, 2)


def test_what_is_replicated_and_what_shrinks() -> None:
    one, four = (make_plan(BIG, tp=tp).ranks for tp in (1, 4))
    assert {rank.vision_bytes for rank in four} == {one[0].vision_bytes}
    assert one[0].kv_bytes_per_token == 4 * four[0].kv_bytes_per_token == 2 * 64 * 8 * 128 * 2
    assert one[0].decoder_bytes / 4 < four[0].decoder_bytes < one[0].decoder_bytes / 3.99
    assert max(r.total_bytes for r in four) < 1.01 * min(r.total_bytes for r in four)
    for rank in four:
        parts = rank.vision_bytes + rank.decoder_bytes + rank.embedding_bytes + rank.activation_bytes + rank.feature_bytes
        assert rank.total_bytes == parts + rank.graph_bytes
        assert 0.1 * GIB < rank.graph_bytes < GIB
    (eager,) = make_plan(BIG, tp=1, enforce_eager=True).ranks
    assert (eager.graph_bytes, eager.total_bytes) == (0, one[0].total_bytes - one[0].graph_bytes)


def test_device_memory_gives_tokens_and_requests() -> None:
    plan = make_plan(BIG, tp=4, device_memory=80, gpu_memory_utilization=0.8, block_size=32)
    rank = plan.ranks[0]
    assert plan.ok and plan.kv_tokens is not None and plan.kv_tokens % 32 == 0
    left = 80 * GIB * 0.8 - DRIVER_BYTES - rank.total_bytes - 32 * rank.kv_bytes_per_token  # a block for rows of padding
    assert 0 <= left - plan.kv_tokens * rank.kv_bytes_per_token < 32 * rank.kv_bytes_per_token
    assert plan.image_tokens == 13 * 256 and plan.request_tokens == 512 + 13 * 256 + 512
    assert plan.max_concurrent == plan.kv_tokens // plan.request_tokens  # a whole number of blocks
    many = make_plan(BIG, tp=4, device_memory=80, request=Request(text_tokens=1, images=3, answer_tokens=7, tiles_per_image=2))
    assert many.request_tokens == 1 + 3 * 512 + 7
    assert make_plan(BIG, tp=4).kv_tokens is None and make_plan(BIG, tp=4).max_concurrent is None
    assert make_plan(BIG, tp=4, device_memory=80, max_model_len=4000).max_concurrent == 0  # such a request is refused


def test_a_plan_that_does_not_fit_is_not_ok() -> None:
    weights = make_plan(BIG, tp=1, device_memory=80)
    assert not weights.ok and weights.problems[0].dimension == "device_memory" and weights.problems[0].size == 80
    assert weights.reason is not None and "take --tp 2 or 4 or 8" in weights.reason and weights.kv_tokens == 0
    length = make_plan(BIG, tp=1, device_memory=86)
    assert not length.ok and length.problems[0].dimension == "max_model_len" and length.problems[0].size == 32768
    assert length.problems[0].source == "config.json, text_config.max_position_embeddings"
    assert length.reason is not None and f"--max-model-len to {length.kv_tokens} or less" in length.reason
    assert make_plan(BIG, tp=1, device_memory=86, max_model_len=length.kv_tokens).ok
    table = make_plan(BIG, tp=None, device_memory=80)
    assert table.ok and [plan.ok for plan in table.degrees] == [False, True, True, True]
    nowhere = make_plan(BIG, tp=None, device_memory=8)
    assert not nowhere.ok and nowhere.problems[0].tp == 8 and (nowhere.reason or "").startswith("no degree fits")


OF_GEMMA = internvl_chat(text("gemma", 16, 16, 3072, 24576, 28, 256000, head_dim=256))


@pytest.mark.parametrize(
    "config,reason",
    [
        (PUBLISHED["InternVL2-26B"][0] | {"template": "internvl_zh"}, "template 'internvl_zh' is not supported"),
        (OF_GEMMA, "llm_config.model_type 'gemma' is not supported"),
        (internvl(text("gemma", 16, 16, 3072, 24576, 28, 256000, head_dim=256)), "text_config.model_type 'gemma'"),
        (internvl(text("phi", 32, 32, 3072, 8192, 32, 32064)), "text_config.model_type 'phi'"),
        (internvl(QWEN_05B | {"layer_types": ["linear_attention"] * 24}), "linear_attention"),
        (internvl(QWEN_05B, SMALL_ENCODER | {"hidden_act": "relu"}), "hidden_act 'relu'"),
        (internvl(QWEN_05B) | {"model_type": "llava_next"}, "model_type 'llava_next'"),
        (internvl(QWEN_05B) | {"model_type": [[0]]}, "[[0]]"),
        (internvl(QWEN_05B, SMALL_ENCODER | {"hidden_act": []}) | {"downsample_ratio": 0}, "hidden_act []"),
        (internvl(QWEN_05B) | {"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not supported"),
        (
            {"vision_config": {}, **text("qwen2_5_omni", 28, 4, 3584, 18944, 28, 152064)},
            "model_type 'qwen2_5_omni'",
        ),
    ],
)
def test_what_cannot_be_served_yet_is_planned_all_the_same(config: dict[str, Any], reason: str) -> None:
    plan = make_plan(config, tp=1)
    assert plan.ok and not plan.supported and plan.reason is not None and reason in plan.reason
    assert plan.ranks[0].decoder_bytes > 0 and plan.ranks[0].kv_bytes_per_token > 0


def test_experts_are_split_too() -> None:
    moe = text("qwen2_moe", 16, 16, 2048, 5632, 24, 151936) | {
        "num_experts": 60,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }
    one, eight = (make_plan(internvl(moe), tp=tp) for tp in (1, 8))
    weights = one.ranks[0].decoder_bytes + one.ranks[0].embedding_bytes
    assert weights / 2 == pytest.approx(14.3e9, rel=0.01)  # Qwen1.5-MoE-A2.7B
    assert eight.ranks[0].decoder_bytes < one.ranks[0].decoder_bytes / 7
    assert {cut.dimension for cut in eight.cuts} >= {"moe_intermediate_size", "shared_expert_intermediate_size"}


@pytest.mark.parametrize("dtype,itemsize", [("auto", 2), ("float32", 4), ("float16", 2)])
def test_the_number_type_scales_the_weights(dtype: str, itemsize: int) -> None:
    base, plan = make_plan(ONE_B, tp=1, dtype="float16"), make_plan(ONE_B, tp=1, dtype=dtype)
    assert plan.ranks[0].decoder_bytes * 2 == base.ranks[0].decoder_bytes * itemsize
    assert plan.dtype == {"auto": "bfloat16"}.get(dtype, dtype)
    assert make_plan({k: v for k, v in ONE_B.items() if k != "dtype"}, tp=1).dtype == "float32"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"text_config": {"model_type": "gpt9"}}, "num_attention_heads is None"),
        ({"text_config": QWEN_05B | {"num_attention_heads": True}}, "num_attention_heads is True"),
        ({"text_config": QWEN_05B | {"num_attention_heads": 10**40}}, "num_attention_heads is 10000"),
        ({"text_config": QWEN_05B | {"vocab_size": "many"}}, "text_config.vocab_size is 'many'"),
        ({"text_config": QWEN_05B | {"num_key_value_heads": 0}}, "num_key_value_heads is 0"),
        ({"text_config": QWEN_05B | {"hidden_size": 2}}, "hidden_size 2 is less than num_attention_heads 14"),
        (
            {"text_config": QWEN_05B | {"model_type": "gpt9", "max_position_embeddings": None}},
            "has no max_position_embeddings; give --max-model-len",
        ),
        ({"dtype": "int4"}, "dtype 'int4'"),
    ],
)
def test_a_config_that_tells_too_little_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_plan(ONE_B | change, tp=2)


@pytest.mark.parametrize(
    "options",
    [{"device_memory": 0}, {"device_memory": float("nan")}, {"max_model_len": 10**6}, {"max_model_len": 0}, {"dtype": "int8"}]
    + [{"gpu_memory_utilization": 2}, {"block_size": 0}, {"request": Request(images=-1)}, {"request": Request(answer_tokens=0)}],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_plan(ONE_B, tp=1, **options)


def test_a_config_without_a_legible_encoder_says_so() -> None:
    plan = make_plan(internvl(QWEN_05B) | {"vision_config": {"hidden_size": [1]}}, tp=2)
    assert plan.ok and not plan.supported and plan.ranks[0].vision_bytes == 0 and any("vision encoder" in n for n in plan.notes)


def test_defaults_are_the_engines() -> None:
    plan, config = make_plan(ONE_B, tp=1, device_memory=24), EngineConfig()
    assert plan.gpu_memory_utilization == config.gpu_memory_utilization
    spelled = make_plan(
        ONE_B,
        tp=1,
        device_memory=24,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
    )
    assert plan == spelled


def command(tmp_path: Path, config: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on a folder that holds nothing but a config.json."""
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return vlserve("plan", str(tmp_path), *arguments)


KEYS = {"ok", "supported", "reason", "tp", "legal_tp", "legal_tp_replicated", "problems", "kv_tokens", "max_concurrent", "ranks"}
RANK_KEYS = {"rank", "vision_bytes", "decoder_bytes", "embedding_bytes", "kv_bytes_per_token", "activation_bytes", "total_bytes"}
RANK_KEYS |= {"feature_bytes", "graph_bytes"}


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    done = command(tmp_path, BIG, "--tp", "4", "--device-memory", "80", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["ok"] and set(document) >= KEYS and "degrees" not in document
    assert [set(rank) for rank in document["ranks"]] == [RANK_KEYS] * 4 and [r["rank"] for r in document["ranks"]] == [0, 1, 2, 3]
    plan = make_plan(BIG, tp=4, source=str(tmp_path / "config.json"), device_memory=80.0)
    assert document == json.loads(json.dumps(plan.to_dict()))

    refused = command(tmp_path, BIG, "--tp", "3", "--json")
    document = json.loads(refused.stdout)
    assert refused.returncode == 1 and not document["ok"] and document["ranks"] == [] and refused.stderr == ""
    assert [set(p) for p in document["problems"]] == [{"dimension", "size", "tp", "source"}] * 2
    assert document["problems"][0]["source"] == f"{tmp_path / 'config.json'}, text_config"

    table = json.loads(vlserve("plan", str(tmp_path / "config.json"), "--json").stdout)
    assert table["tp"] is None and [d["tp"] for d in table["degrees"]] == [1, 2, 4, 8]
    assert all(set(d) >= KEYS and len(d["ranks"]) == d["tp"] for d in table["degrees"])


@pytest.mark.parametrize("config", ["{", "[]", "[" * 100_000, '{"model_type": "internvl"}', "\x00", '"\\ud800"'])
def test_an_unreadable_config_is_a_document_too(tmp_path: Path, config: str) -> None:
    done = command(tmp_path, config, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 1 and document["ok"] is False and document["reason"] and set(document) >= KEYS
    assert "Traceback" not in done.stderr
    plain = vlserve("plan", str(tmp_path))
    assert plain.returncode == 1 and plain.stderr.startswith("vlserve: error: ") and plain.stdout == ""


def test_missing_models_and_wrong_degrees_are_documents_too(tmp_path: Path) -> None:
    for arguments in ((str(tmp_path),), ("/no/where",), ("demo", "--tp", "0"), ("demo", "--device-memory", "nan")):
        done = vlserve("plan", *arguments, "--json")
        assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False, arguments


def test_the_report_is_for_people(tmp_path: Path) -> None:
    text = command(tmp_path, BIG, "--device-memory", "80").stdout
    for part in (
        "num_attention_heads",
        "37,919*",
        "vocab_size by 2 rows",
        "split by vocabulary",
        "Whole on every rank",
        "10.48 GiB",
    ):
        assert part in text
    assert "Degrees that work: 1, 2, 4, 8; with --replicate-kv-heads also 40" in text and "A request here is 4,352 tokens" in text
    assert max(map(len, text.splitlines()[1:])) <= 130
    refused = command(tmp_path, BIG, "--tp", "3")
    assert refused.returncode == 1 and refused.stdout == "" and "1, 2, 4, 8" in refused.stderr
    small = command(tmp_path, BIG, "--tp", "1", "--device-memory", "80")
    assert small.returncode == 1 and "10.48 GiB" in small.stdout and "does not fit" in small.stderr
    other = command(tmp_path, OF_GEMMA, "--tp", "4")
    assert other.returncode == 0 and "cannot serve this model yet" in other.stdout and "gemma" in other.stdout


def test_the_demo_is_planned_without_torch() -> None:
    loaded = loaded_by("import vlserve.commands.main; vlserve.commands.main.main(['plan', 'demo', '--json'])")
    assert not loaded & {"torch", "timm", "transformers", "huggingface_hub", "fastapi"}
    assert (
        "40"
        in subprocess.run(
            [sys.executable, "-c", "import vlserve.commands.main as c; c.main(['plan', '--tp', '2'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_a_plan_is_a_value() -> None:
    plan = make_plan(ONE_B, tp=2)
    assert isinstance(plan, Plan) and plan == make_plan(ONE_B, tp=2) and hash(plan) == hash(make_plan(ONE_B, tp=2))
