"""The config.json of published models, written anew with their shapes: the names that people type, and what is known of each.

Sizes, keys and values are those of the published files, as far as anything here depends on them. `billions`: of parameters, as
the model cards and the Hub say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
VIT_300M: Config = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VIT_6B: Config = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}
DYNAMIC: Config = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
SU: Config = {"type": "su", "short_factor": [1.0 + i / 64 for i in range(48)], "long_factor": [1.0 + i for i in range(48)]}
YARN: Config = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
YARN |= {"truncate": False}
CLASSES = {
    "gpt_oss": "GptOssForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# keys of each decoder that do not follow from its size
OF: dict[str, Config] = {
    "gpt_oss": {
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "rope_scaling": YARN,
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    "internlm2": {"bias": False, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000},
    "internlm3": {"bias": False, "qkv_bias": False, "head_dim": 128, "rope_scaling": DYNAMIC, "rope_theta": 50000000},
    "llama": {"rope_scaling": None},
    "mistral": {"rope_theta": 10000.0, "sliding_window": 4096},
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": 2047},
    "qwen2": {"rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 70},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000, "use_sliding_window": False},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
}
LONG_PHI: Config = {"max_position_embeddings": 131072, "rope_scaling": SU, "sliding_window": 262144}
MXFP4: Config = {"quant_method": "mxfp4"}
MXFP4 |= {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
AWQ: Config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def text(decoder: str, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, vocab: int, **more: Any) -> Config:
    """A decoder's own config.json."""
    config = {
        "architectures": [CLASSES[decoder]],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "model_type": decoder,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }
    if decoder == "gpt_oss":
        config["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return config | OF[decoder] | more


def original(llm: Config, vision: Config, template: str, **more: Any) -> Config:
    """OpenGVLab's format."""
    is_large = vision is VIT_6B
    norms = {"qkv_bias": not is_large, "qk_normalization": is_large, "norm_type": "rms_norm" if is_large else "layer_norm"}
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": {key: value for key, value in llm.items() if key != "tie_word_embeddings"},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": {**vision, **norms, "image_size": 448, "model_type": "intern_vit_6b", "patch_size": 14},
        **more,
    }


def converted(llm: Config, vision: Config, image_token_id: int = 151667) -> Config:
    """transformers' format, "-hf"; InternLM's decoders are stored as the Llama that they are."""
    is_large = vision is VIT_6B
    norms = {"attention_bias": not is_large, "use_qk_norm": is_large, "norm_type": "rms_norm" if is_large else "layer_norm"}
    if llm["model_type"] == "internlm2":
        llm = llm | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": {key: value for key, value in llm.items() if key != "tie_word_embeddings"},
        "torch_dtype": "bfloat16",
        "vision_config": {**vision, **norms, "image_size": [448, 448], "model_type": "internvl_vision", "patch_size": [14, 14]},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


@dataclass(frozen=True, kw_only=True)
class Published:
    name: str
    config: Config
    degrees: tuple[int, ...]  # that need no copies of key-value heads
    billions: float | None = None
    replicated: tuple[int, ...] = ()  # that need them

    @property
    def llm(self) -> Config:
        found: Config = self.config.get("llm_config") or self.config.get("text_config") or self.config
        return found

    @property
    def decoder(self) -> str:
        return str(self.llm["model_type"])


UP_TO_8, UP_TO_4 = (1, 2, 4, 8), (1, 2, 4)
QWEN2_05B = text("qwen2", 896, 14, 2, 4864, 24, 151655)
QWEN = dict[str, Config](
    small=text("qwen2", 896, 14, 2, 4864, 24, 151674, rope_scaling=DYNAMIC),
    b1_5=text("qwen2", 1536, 12, 2, 8960, 28, 151674, rope_scaling=DYNAMIC),
    b3=text("qwen2", 2048, 16, 2, 11008, 36, 151674, rope_scaling=DYNAMIC),
    b7=text("qwen2", 3584, 28, 4, 18944, 28, 151674, rope_scaling=DYNAMIC),
    b14=text("qwen2", 5120, 40, 8, 13824, 48, 151674, rope_scaling=DYNAMIC),
    b32=text("qwen2", 5120, 40, 8, 27648, 64, 151674, rope_scaling=DYNAMIC),
    b72=text("qwen2", 8192, 64, 8, 29568, 80, 151674, rope_scaling=DYNAMIC),
)
LM_1_8B = text("internlm2", 2048, 16, 8, 8192, 24, 92553)
LM_7B = text("internlm2", 4096, 32, 8, 14336, 32, 92553)
LM_20B = text("internlm2", 6144, 48, 8, 16384, 48, 92553)
LM_8B = text("internlm2", 4096, 32, 2, 10240, 48, 128512)  # InternLM3's sizes, stored as InternLM2
YI_34B = text("llama", 7168, 56, 8, 20480, 60, 64007, max_position_embeddings=8192, rope_theta=5000000.0)
LLAMA_70B = text("llama", 8192, 64, 8, 28672, 80, 128265, max_position_embeddings=8192, rope_theta=500000.0)
PHI_128K = text("phi3", 3072, 32, 32, 8192, 32, 32020, **LONG_PHI)
QWEN3 = {
    "1B": (text("qwen3", 1024, 16, 8, 3072, 28, 151936), VIT_300M, 1.06),
    "2B": (text("qwen3", 2048, 16, 8, 6144, 28, 151936), VIT_300M, 2.35),
    "4B": (text("qwen3", 2560, 32, 8, 9728, 36, 151936), VIT_300M, 4.73),
    "8B": (text("qwen3", 4096, 32, 8, 12288, 36, 151936), VIT_300M, 8.53),
    "14B": (text("qwen3", 5120, 40, 8, 17408, 40, 151936), VIT_300M, 15.1),
    "38B": (text("qwen3", 5120, 64, 8, 25600, 64, 151936), VIT_6B, 38.4),
    "30B-A3B": (text("qwen3_moe", 2048, 32, 4, 6144, 48, 151936, moe_intermediate_size=768), VIT_300M, 30.8),
    "241B-A28B": (text("qwen3_moe", 4096, 64, 4, 12288, 94, 151936, moe_intermediate_size=1536), VIT_6B, 240.7),
    "GPT-OSS-20B-A4B-Preview": (text("gpt_oss", 2880, 64, 8, 2880, 24, 201088), VIT_300M, 21.2),
}


def _degrees(llm: Config) -> tuple[int, ...]:
    return {2: (1, 2), 4: UP_TO_4, 8: UP_TO_8, 32: (*UP_TO_8, 16, 32), 40: (1, 2, 4, 5, 8, 10, 20, 40)}[
        llm["num_key_value_heads"]
    ]


def _vision(name: str, llm: Config, vision: Config, billions: float, template: str, **more: Any) -> Published:
    config = original(llm, vision, template, **more)
    return Published(name=f"OpenGVLab/{name}", config=config, degrees=_degrees(llm), billions=billions)


def _hf(name: str, llm: Config, vision: Config, billions: float, image_token_id: int) -> Published:
    config = converted(llm, vision, image_token_id)
    return Published(name=f"OpenGVLab/{name}", config=config, degrees=_degrees(llm), billions=billions)


def _text(name: str, config: Config, billions: float) -> Published:
    return Published(name=name, config=config, degrees=_degrees(config), billions=billions)


_2_5 = {
    "1B": (QWEN["small"], VIT_300M, 0.938),
    "2B": (LM_1_8B, VIT_300M, 2.21),
    "4B": (QWEN["b3"], VIT_300M, 3.71),
    "8B": (LM_7B, VIT_300M, 8.08),
    "26B": (LM_20B, VIT_6B, 25.5),
    "38B": (QWEN["b32"], VIT_6B, 38.4),
    "78B": (QWEN["b72"], VIT_6B, 78.4),
}
_3 = {
    "1B": (QWEN["small"], VIT_300M, 0.938),
    "2B": (QWEN["b1_5"], VIT_300M, 2.09),
    "8B": (QWEN["b7"], VIT_300M, 7.94),
    "9B": (LM_8B, VIT_300M, 9.14),
    "14B": (QWEN["b14"], VIT_300M, 15.1),
    "38B": (QWEN["b32"], VIT_6B, 38.4),
    "78B": (QWEN["b72"], VIT_6B, 78.4),
}
_PUBLISHED: list[Published] = [
    _vision("InternVL-Chat-V1-5", LM_20B, VIT_6B, 25.5, "internlm2-chat"),
    _vision("Mini-InternVL-Chat-2B-V1-5", LM_1_8B, VIT_300M, 2.21, "internlm2-chat"),
    _vision("Mini-InternVL-Chat-4B-V1-5", PHI_128K, VIT_300M, 4.15, "phi3-chat"),
    _vision("InternVL2-1B", QWEN2_05B, VIT_300M, 0.938, "Hermes-2"),
    _vision("InternVL2-2B", LM_1_8B, VIT_300M, 2.21, "internlm2-chat"),
    _vision("InternVL2-4B", PHI_128K, VIT_300M, 4.15, "phi3-chat"),
    _vision("InternVL2-8B", LM_7B, VIT_300M, 8.08, "internlm2-chat"),
    _vision("InternVL2-26B", LM_20B, VIT_6B, 25.5, "internlm2-chat"),
    _vision("InternVL2-40B", YI_34B, VIT_6B, 40.1, "Hermes-2"),
    _vision("InternVL2-Llama3-76B", LLAMA_70B, VIT_6B, 76.3, "internlm2-chat"),
    *(_vision(f"InternVL2_5-{size}{edition}", *of, "internvl2_5") for edition in ("", "-MPO") for size, of in _2_5.items()),
    *(_vision(f"InternVL3-{size}", *of, "internvl2_5") for size, of in _3.items()),
    *(_hf(f"InternVL3-{size}-hf", *of, 92546 if size == "9B" else 151667) for size, of in _3.items()),
    *(_vision(f"InternVL3_5-{size}", *of, "internvl3_5" + "_gpt_oss" * ("OSS" in size)) for size, of in QWEN3.items()),
    *(_hf(f"InternVL3_5-{size}-HF", *of, 200021 if "OSS" in size else 151671) for size, of in QWEN3.items()),
    *(
        _vision(f"InternVL2-{size}-AWQ", llm | {"quantization_config": AWQ, "torch_dtype": "float16"}, vision, billions, template)
        for size, llm, vision, billions, template in (
            ("2B", LM_1_8B, VIT_300M, 2.21, "internlm2-chat"),
            ("8B", LM_7B, VIT_300M, 8.08, "internlm2-chat"),
            ("26B", LM_20B, VIT_6B, 25.5, "internlm2-chat"),
            ("40B", YI_34B, VIT_6B, 40.1, "Hermes-2"),
            ("Llama3-76B", LLAMA_70B, VIT_6B, 76.3, "internlm2-chat"),
        )
    ),
    *(_text(f"Qwen/{name}", text("qwen2", 3584, 28, 4, 18944, 28, 152064), 7.62) for name in ("Qwen2-7B", "Qwen2.5-7B-Instruct")),
    _text("Qwen/QwQ-32B", text("qwen2", 5120, 40, 8, 27648, 64, 152064, max_position_embeddings=131072), 32.8),
    _text(
        "Qwen/Qwen2.5-72B-Instruct-AWQ",
        text("qwen2", 8192, 64, 8, 29696, 80, 152064, quantization_config=AWQ, torch_dtype="float16"),
        73.0,
    ),
    _text("Qwen/Qwen3-4B", text("qwen3", 2560, 32, 8, 9728, 36, 151936, tie_word_embeddings=True), 4.02),
    _text("Qwen/Qwen3-30B-A3B", text("qwen3_moe", 2048, 32, 4, 6144, 48, 151936, moe_intermediate_size=768), 30.5),
    _text("openai/gpt-oss-20b", text("gpt_oss", 2880, 64, 8, 2880, 24, 201088, quantization_config=MXFP4), 20.9),
    _text(
        "meta-llama/Llama-2-13b-chat-hf",
        text("llama", 5120, 40, 40, 13824, 40, 32000, max_position_embeddings=4096, torch_dtype="float16"),
        13.0,
    ),
    _text(
        "meta-llama/Meta-Llama-3-70B-Instruct",
        text("llama", 8192, 64, 8, 28672, 80, 128256, max_position_embeddings=8192, rope_theta=5e5),
        70.6,
    ),
    _text("mistralai/Mistral-7B-v0.1", text("mistral", 4096, 32, 8, 14336, 32, 32000), 7.24),
    _text("internlm/internlm2_5-7b-chat", text("internlm2", 4096, 32, 8, 14336, 32, 92544), 7.74),
    _text("internlm/internlm3-8b-instruct", text("internlm3", 4096, 32, 2, 10240, 48, 128512), 8.80),
    _text("microsoft/Phi-3-mini-4k-instruct", text("phi3", 3072, 32, 32, 8192, 32, 32064), 3.82),
    _text("microsoft/Phi-3.5-mini-instruct", text("phi3", 3072, 32, 32, 8192, 32, 32064, **LONG_PHI), 3.82),
    _text(
        "microsoft/Phi-4-mini-instruct",
        text(
            *("phi3", 3072, 24, 8, 8192, 32, 200064),
            **LONG_PHI | {"rope_scaling": SU | {"type": "longrope"}},
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
        ),
        3.84,
    ),
]
PUBLISHED: dict[str, Published] = {model.name: model for model in _PUBLISHED}
