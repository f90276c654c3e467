"""The demo model without its weights: tokenizer, chat template, configuration, and the folder that transformers loads.

Knows nothing of training; the tokenizer is made from a sample of the questions and answers.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pictures import draw_scene
from questions import about, conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlserve.vision.config import ImageConfig

if TYPE_CHECKING:
    pass

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
SPECIAL += ("<ref>", "</ref>", "<box>", "</box>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{ '<IMG_CONTEXT>\\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# Qwen2's pre-tokenizer pattern
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TILE, PATCH = 96, 8
IMAGE = ImageConfig(tile_size=TILE, tokens_per_tile=(TILE // PATCH // 2) ** 2, min_patches=1, max_patches=4)


def build_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over a sample of the questions and answers, special tokens at the end."""
    lines = []
    for i in range(4000):
        rng = random.Random(f"tokenizer-{seed}-{i}")
        _, things = draw_scene(rng, 0.0)
        lines += [text for talk in [*conversations(rng, things, 6), about(rng)] for turn in talk for text in turn]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    torch.manual_seed(seed)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    vocab = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=160,
            num_hidden_layers=4,
            num_attention_heads=5,
            intermediate_size=640,
            image_size=[TILE, TILE],
            patch_size=[PATCH, PATCH],
            attention_bias=True,
            norm_type="layer_norm",
            use_qk_norm=False,
            use_mean_pooling=True,
            layer_scale_init_value=1.0,
        ),
        text_config=Qwen2Config(
            vocab_size=vocab,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=640,
            max_position_embeddings=8192,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=pad,
            eos_token_id=end,
            pad_token_id=pad,
        ),
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=IMAGE.tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    # measured on a CPU: the fused attention's backward pass is half of a step at these small sizes
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    _initialise(model)
    with torch.no_grad():  # the default initialisation leaves these at zero
        embeddings = model.model.vision_tower.embeddings
        embeddings.cls_token.normal_(0, 0.02)
        embeddings.position_embeddings.normal_(0, 0.02)
    return model


def export(model, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that `transformers.AutoModelForImageTextToText` and `AutoProcessor` load."""
    from transformers import GenerationConfig, InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": TILE, "width": TILE}
    text = model.config.text_config
    model = model.to(torch.bfloat16).cpu().eval()
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False)
    model.save_pretrained(out)
    path = out / "config.json"  # stored in bfloat16 for its size, meant to be computed in float32
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=text.max_position_embeddings,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    image_processor = GotOcr2ImageProcessor(
        size=size,
        crop_to_patches=True,
        min_patches=IMAGE.min_patches,
        max_patches=IMAGE.max_patches,
        image_mean=list(IMAGE.mean),
        image_std=list(IMAGE.std),
    )
    processor = InternVLProcessor(
        image_processor=image_processor,
        video_processor=InternVLVideoProcessor(size=size),
        tokenizer=fast,
        image_seq_length=IMAGE.tokens_per_tile,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(out)
    image_processor.save_pretrained(out)


def _initialise(model) -> None:
    """Scale by fan-in: the usual deviation of 0.02 is made for widths of thousands and starves narrow layers."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            deviation = module.weight[0].numel() ** -0.5
            if name.endswith(("projection_layer", "fc2", "o_proj", "down_proj")):  # eight of them add up in a residual
                deviation *= 8**-0.5
            torch.nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
