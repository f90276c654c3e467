"""Makes small random checkpoints in transformers' own formats, with real tokenizers and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
    "rope_theta": 150000,
}
TILE, PATCH = 28, 7  # 16 patches and 4 tokens a tile


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["What shape is it? A red circle and two blue squares.", "user assistant system", "the picture shows"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def make_checkpoint(folder: Path, decoder: str = "qwen2", *, seed: int = 0, max_shard: str = "5GB", **text: Any) -> Path:
    """A random InternVL checkpoint with a `decoder` in `_text_config`, saved by transformers; or a Qwen-VL one, of the kind that
    `decoder` names."""
    from tests.qwen_vl import KINDS, make_qwen_vl

    if decoder in KINDS:
        return make_qwen_vl(folder, decoder, seed=seed, max_shard=max_shard, **text)
    from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    tokenizer = make_tokenizer()
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=80,
        image_size=[TILE, TILE],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
        norm_type=text.pop("norm_type", "layer_norm"),
        use_qk_norm=text.pop("vision_qk_norm", False),
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=_text_config(decoder, tokenizer, end, pad, text),
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():  # far enough from zero that answers vary and gaps between logits are wide
        for name, parameter in model.named_parameters():
            if ".experts." in name and parameter.ndim == 3:  # GPT-OSS has inputs first
                parameter.normal_(0, parameter.shape[1 if decoder == "gpt_oss" else 2] ** -0.5)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif name.endswith("sinks"):  # of some weight, and others of much
                parameter.normal_(0, 2)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder, max_shard_size=max_shard)
    _save_processor(folder, tokenizer)
    return folder


def _text_config(decoder: str, tokenizer: Tokenizer, end: int, pad: int, extra: dict[str, Any]) -> Any:
    from transformers import (
        GptOssConfig,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    kinds = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}
    kinds |= {"gpt_oss": GptOssConfig, "granite": GraniteConfig, "phi3": Phi3Config, "qwen3_moe": Qwen3MoeConfig}
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size() + 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": end,
        "bos_token_id": pad,
        "pad_token_id": pad,
    }
    if decoder.startswith("qwen3"):
        settings["head_dim"] = 16
    if decoder == "qwen3_moe":
        settings |= {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
    if decoder == "gpt_oss":  # experts of three groups of MXFP4
        settings |= {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 9}
        settings |= {"hidden_size": 64, "intermediate_size": 96, "rope_parameters": GPT_OSS_ROPE}
    if decoder == "mistral":
        settings["sliding_window"] = None
    return kinds[decoder](**{**settings, **extra})


def _save_processor(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": TILE, "width": TILE}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=fast,
        image_seq_length=(TILE // PATCH // 2) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
