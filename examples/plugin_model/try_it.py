"""Makes a small LLaVA checkpoint with random weights and asks it about a picture.

    pip install examples/plugin_model
    python examples/plugin_model/try_it.py

The answer is noise, since nobody trained the weights; that it comes shows that the plugin is found and runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vlserve import VLPipeline
from vlserve.models.checkpoint import DEMO

PICTURE = Path(__file__).parent.parent / "pictures" / "shapes.png"
SIZE, PATCH = 28, 7
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(folder: Path) -> Path:
    """A folder as transformers saves it: random weights, the tokenizer of vlserve's demo with one token more."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    end, image = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=PATCH
        ),
        text_config=Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=end,
        ),
        image_token_index=image,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # far enough from zero that answers differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, VLPipeline(str(make_checkpoint(Path(folder))), kv_cache_gib=0.05) as pipe:
        print(pipe(("What shape is it?", PICTURE), max_tokens=8))
