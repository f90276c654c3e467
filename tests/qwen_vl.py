"""Makes small random Qwen-VL checkpoints: as the models are published, or as transformers saves them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken

from tests import checkpoints

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# Qwen2-VL's and Qwen2.5-VL's, to the letter
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def make_qwen_vl(
    folder: Path,
    kind: str,
    *,
    layout: str = "published",
    seed: int = 0,
    most_features: int = 48,
    max_shard: str = "5GB",
    **text: Any,
) -> Path:
    """A random checkpoint.

    Args:
        layout: `published`, by the names and keys of the models' own repositories, or `saved`, as transformers writes them.
        most_features: of a picture. text: settings of the decoder.
    """
    from transformers import GenerationConfig

    tokenizer = checkpoints.make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in TOKENS])
    ids = {name: tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", *TOKENS)}
    torch.manual_seed(seed)
    model = _model(kind, tokenizer.get_vocab_size() + 3, ids, text)
    with torch.no_grad():  # far enough from zero that answers vary and gaps between logits are wide
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(1, 0.1)
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder, max_shard_size=max_shard)
    if layout == "published":
        _publish(folder, kind, model)
    _save_processor(folder, kind, tokenizer, most_features)
    return folder


def _model(kind: str, vocab_size: int, ids: dict[str, int], extra: dict[str, Any]) -> Any:
    import transformers

    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4 if kind == "qwen3_vl" else 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
        **extra,
    }
    tied = text.pop("tie_word_embeddings", False)
    if kind == "qwen3_vl":
        text.setdefault("head_dim", 16)
        half = text["head_dim"] // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
    else:
        text.pop("head_dim", None)
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [half // 4, half - half // 4 - half // 2 + half // 8, half // 2 - half // 8]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    vision: dict[str, Any] = {
        "qwen2_vl": {"depth": 3, "embed_dim": 48, "hidden_size": text["hidden_size"], "num_heads": 2, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 60,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
        },
        "qwen3_vl": {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 60,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 2],
            "patch_size": 16,
        },
    }[kind]
    if kind == "qwen3_vl" and text["num_hidden_layers"] < 2:
        vision["deepstack_visual_indexes"] = [1]
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(transformers, f"{names[kind]}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    return getattr(transformers, f"{names[kind]}ForConditionalGeneration")(config).eval()


def _publish(folder: Path, kind: str, model: Any) -> None:
    """Rewrite config.json and the weights as the models' own repositories have them."""
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    for key in ("layer_types", "rope_parameters"):
        text.pop(key, None)
        vision.pop(key, None)
    vision["model_type"] = kind
    if kind == "qwen3_vl":
        text["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"}
        config = config | {"text_config": text, "vision_config": vision}
    else:
        text.pop("model_type")
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text |= {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 28}
        vision["in_chans"] = vision.pop("in_channels", 3)
        config = {**text, **config, "vision_config": vision, "torch_dtype": "float32"}
        config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    if kind != "qwen3_vl":
        tensors = {_older(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _older(name: str) -> str:
    return re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))


def _save_processor(folder: Path, kind: str, tokenizer: Any, most_features: int) -> None:
    from transformers import PreTrainedTokenizerFast

    is_short = "<|im_start|>" not in checkpoints.CHAT_TEMPLATE
    template = checkpoints.CHAT_TEMPLATE.replace("<IMG_CONTEXT>", PICTURE) if is_short else TEMPLATE
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    patch = 16 if kind == "qwen3_vl" else 14
    area = (2 * patch) ** 2
    settings: dict[str, Any] = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    if kind == "qwen3_vl":
        settings |= {"size": {"longest_edge": most_features * area, "shortest_edge": area}, **HALF}
        settings |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
        video = {**settings, "video_processor_type": "Qwen3VLVideoProcessor"}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    else:
        settings |= {"min_pixels": area, "max_pixels": most_features * area, **CLIP}
        name = "Qwen2VLProcessor" if kind == "qwen2_vl" else "Qwen2_5_VLProcessor"
        settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": name}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
