"""Checkpoints in OpenGVLab's own format with the weights of one in transformers' format; names, shapes and keys as published."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_VISION = (
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.(q_norm|k_norm)\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)
_PROJECTOR = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
CLASSES = {
    "gpt_oss": "GptOssForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
}
_INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# of InternVL3-8B's config.json, whose other keys are transformers' own
OUTER: dict[str, Any] = {
    "_commit_hash": None,
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    },
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "image_fold": None,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "system_message": None,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
}


def make_original(
    source: Path, folder: Path, *, decoder: str | None = None, vision: dict[str, Any] | None = None, **outer: Any
) -> Path:
    """`source`'s weights in OpenGVLab's format; `outer`, `vision`: keys of config.json that are to differ.

    `decoder`: another model_type for the decoder's, of which a Llama's weights are one too: internlm2, internlm3.
    """
    folder.mkdir(parents=True)
    stored = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    theirs = json.loads((source / "config.json").read_text())
    renamed = rename_weights(stored)
    if decoder == "internlm2":
        renamed = as_internlm2(renamed, theirs["text_config"])
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = _config(theirs, decoder) | outer | {"vision_config": _vision(theirs) | (vision or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "transformers_version": "4.48.3"}))
    _write_tokenizer(source, folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 448,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "resample": 3,
                "size": 448,
            }
        )
    )
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "conversation.py"):
        (folder / name).write_text("import os\n\nos._exit(77)  # whoever runs this is gone\n")
    return folder


def rename_weights(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to OpenGVLab's; query, key and value of the encoder become one tensor."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower."):
            name = name.removeprefix("vision_tower.")
            if match := re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)", name):
                if match[2] == "q":
                    parts = [stored[_like(stored, name.replace("q_proj", f"{part}_proj"))] for part in "qkv"]
                    found[f"vision_model.encoder.layers.{match[1]}.attn.qkv.{match[3]}"] = torch.cat(parts)
                continue
            for pattern, text in _VISION:
                name = re.sub(pattern, text, name)
            found[f"vision_model.{name}"] = tensor
        elif name.startswith("multi_modal_projector."):
            module, kind = name.split(".")[1:]
            found[f"mlp1.{_PROJECTOR[module]}.{kind}"] = tensor
        elif name == "lm_head.weight":
            found["language_model.lm_head.weight"] = tensor
        else:
            inner = name.removeprefix("language_model.").removeprefix("model.")
            found["language_model." + (inner if inner == "lm_head.weight" else f"model.{inner}")] = tensor
    found.setdefault("language_model.lm_head.weight", found["language_model.model.embed_tokens.weight"])  # it unties all heads
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def as_internlm2(stored: dict[str, torch.Tensor], text: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Names of InternLM2, and `wqkv`: of each key-value head its queries, its key and its value."""
    heads, dim = text["num_key_value_heads"], text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if match := re.search(r"(.*)self_attn\.([qkv])_proj\.weight", name):
            if match[2] == "q":
                parts = [stored[name.replace("q_proj", f"{part}_proj")].unflatten(0, (heads, -1, dim)) for part in "qkv"]
                found[f"{match[1]}attention.wqkv.weight"] = torch.cat(parts, 1).flatten(0, 2)
            continue
        for theirs, ours in _INTERNLM2.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        found[name] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _like(stored: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in stored if name.endswith(f"vision_tower.{ending}"))


def _config(theirs: dict[str, Any], decoder: str | None) -> dict[str, Any]:
    text = dict(theirs["text_config"]) | ({} if decoder is None else {"model_type": decoder, "bias": False, "qkv_bias": False})
    side = theirs["vision_config"]["image_size"][0]
    rope = text.pop("rope_parameters", None) or {}
    llm = text | {
        "architectures": [CLASSES[text["model_type"]]],
        "eos_token_id": text["bos_token_id"],  # as in InternVL3-8B: not the end of a turn
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": rope if text["model_type"] == "gpt_oss" else {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "torch_dtype": "float32",
        "use_cache": False,
    }
    return OUTER | {"force_image_size": side, "hidden_size": llm["hidden_size"], "llm_config": llm}


def _vision(theirs: dict[str, Any]) -> dict[str, Any]:
    vision = theirs["vision_config"]
    copied = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type", "layer_norm_eps")
    return {
        **{key: vision[key] for key in copied},
        "architectures": ["InternVisionModel"],
        "hidden_act": "gelu",
        "image_size": vision["image_size"][0],
        "patch_size": vision["patch_size"][0],
        "model_type": "intern_vit_6b",
        "moe_intermediate_size": 768,
        "num_channels": 3,
        "num_experts": 8,
        "qk_normalization": vision["use_qk_norm"],
        "qkv_bias": vision["attention_bias"],
        "tie_word_embeddings": True,
        "use_flash_attn": True,
        "use_moe": False,
    }


def _write_tokenizer(source: Path, folder: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json, as Qwen2's slow tokenizer has them; no tokenizer.json."""
    described = json.loads((source / "tokenizer.json").read_text())
    added = {token["content"]: token for token in described["added_tokens"]}
    vocab = {piece: id for piece, id in described["model"]["vocab"].items() if piece not in added}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({name: token["id"] for name, token in added.items()}))
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {flag: t[flag] for flag in flags} for t in added.values()},
        "bos_token": None,
        "chat_template": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",  # strings only, as Qwen2.5's
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 12288,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_text(source: Path, folder: Path, decoder: str | None = None) -> Path:
    """The language model alone, as its own repository has it; `decoder` as in `make_original`."""
    folder.mkdir(parents=True)
    theirs = json.loads((source / "config.json").read_text())
    stored = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    renamed = {name: tensor for name, tensor in rename_weights(stored).items() if name.startswith("language_model.")}
    if theirs["tie_word_embeddings"]:
        del renamed["language_model.lm_head.weight"]
    if decoder == "internlm2":
        renamed = as_internlm2(renamed, theirs["text_config"])
    tensors = {name.removeprefix("language_model."): tensor for name, tensor in renamed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = theirs["text_config"] | {"tie_word_embeddings": theirs["tie_word_embeddings"], "torch_dtype": "float32"}
    config |= {} if decoder is None else {"model_type": decoder, "bias": False, "qkv_bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    template = json.loads((source / "processor_config.json").read_text()).get("chat_template")
    (folder / "chat_template.jinja").write_text(template or (source / "chat_template.jinja").read_text())
    return folder
