"""Every family that is served, in small: compared with transformers on the CPU, and on a rehearsed card with the CPU.

A family that comes is named here, and is then in both.
"""

from __future__ import annotations

from typing import Any

PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
# the decoder, and what of its text config is not as `make_checkpoint` has it
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "max_shard": "100KB"}),
    ("qwen3", {}),
    ("llama", {}),
    (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    ("mistral", {}),
    ("mistral", {"sliding_window": 9}),
    ("qwen3", WINDOW),
    ("qwen2", {"vision_qk_norm": True, "norm_type": "rms_norm"}),
    ("qwen3_moe", {}),
    ("qwen3_moe", WINDOW | {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    ("gpt_oss", {}),
    ("phi3", {"rope_parameters": PLAIN}),
    ("phi3", {"rope_parameters": PLAIN, "sliding_window": 7}),
]
OF_LLAMA = ("internlm2", "internlm3")  # transformers has none of them; their arithmetic is a Llama's
