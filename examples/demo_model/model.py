"""The demo model without its weights: tokenizer, chat template, configuration, and the folder that transformers loads.

Knows nothing of training; the tokenizer is made from a sample of the questions and answers.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import phrases
import torch
from asker import Asker
from pictures import Bar, Picture, Thing
from PIL import Image
from questions import ask
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from world import COLOURS, LANGUAGES, SHAPES

from vlserve.vision.image_config import ImageConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
PLAIN = ("<ref>", "</ref>", "<box>", "</box>")  # one token each, but part of an answer's text
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
# letters in capitals, digits and Chinese characters stand alone, so that the model spells what it reads
PATTERN = r"\p{Han}|\p{Lu}(?!\p{Ll})| ?\p{Lu}?\p{Ll}+|\p{L}|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TILE, PATCH = 144, 12
IMAGE = ImageConfig(tile_size=TILE, tokens_per_tile=(TILE // PATCH // 2) ** 2, min_patches=1, max_patches=3)


def build_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE over a sample of the questions and answers, special tokens at the end."""
    lines = [
        text for group in (phrases.TALK, phrases.REPLIES) for by in group.values() for v in by.values() for text in _texts(v)
    ]
    for i in range(6000):
        rng = random.Random(f"tokenizer-{seed}-{i}")
        asker = Asker(rng, [_imagined(rng)], rng.choice(LANGUAGES))
        turn = ask(asker)
        lines += [turn.question, turn.text]
    lines += [text for key in phrases.PHRASES for by in phrases.PHRASES[key].values() for text in by] * 4
    lines += [text for by in phrases.ANSWERS.values() for text in by.values()] * 4
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
    trainer = trainers.BpeTrainer(vocab_size=1400, min_frequency=3, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN])
    return tokenizer


def _texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _imagined(rng: random.Random) -> Picture:
    """Shapes without a drawing: enough to make questions."""
    if rng.random() < 0.12:
        return Picture(
            Image.new("RGB", (1, 1)), bars=tuple(Bar(rng.randint(1, 10), (0.0, 0.0, 1.0, 1.0)) for _ in range(rng.randint(2, 5)))
        )
    things = []
    for _ in range(rng.randint(1, 6)):
        size = rng.uniform(0.1, 0.5)
        x, y = rng.random() * (1 - size), rng.random() * (1 - size)
        things.append(Thing(rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), (x, y, x + size, y + size), size))
    return Picture(Image.new("RGB", (1, 1)), tuple(things))


def build_model(tokenizer: Tokenizer, seed: int):
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    torch.manual_seed(seed)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    vocab = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=160,
            num_hidden_layers=6,
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
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=640,
            max_position_embeddings=8192,
            rope_theta=1e6,
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
    _initialise(model)
    with torch.no_grad():
        embeddings = model.model.vision_tower.embeddings
        embeddings.cls_token.normal_(0, 0.02)
        embeddings.position_embeddings[0, 1:] = _waves(TILE // PATCH, embeddings.position_embeddings.shape[-1])
        for layer in model.model.vision_tower.encoder.layer:  # so that a patch first looks at its neighbours (arXiv 2305.09828)
            layer.attention.k_proj.weight.copy_(layer.attention.q_proj.weight)
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of a patch's column and row, [side * side, width]: near patches are alike from the beginning."""
    rates = torch.logspace(math.log10(2 * math.pi / (4 * side)), math.log10(math.pi / 1.5), width // 4)
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


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
            if name.endswith(("projection_layer", "fc2", "o_proj", "down_proj")):  # twelve of them add up in a residual
                deviation *= 12**-0.5
            torch.nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
