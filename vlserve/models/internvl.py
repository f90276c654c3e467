"""InternVL in transformers' format (`model_type: internvl`): InternViT, pixel shuffle with an MLP, and a Llama-shaped decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlserve.models.architecture import Architecture, Config, Files
from vlserve.models.text import TextPreprocessor
from vlserve.models.tiles import TilePreprocessor, image_processor_settings, image_token_id, image_tokens
from vlserve.vision.config import read_encoder_config
from vlserve.vision.image_config import check_other_names, read_image_config

if TYPE_CHECKING:
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model

TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")


def preprocessor(config: Config, files: Files) -> TilePreprocessor:
    image = read_image_config(image_processor_settings(files), read_encoder_config(config))
    check_other_names(config, image.min_patches, image.max_patches)
    length = files.get("processor_config.json", {}).get("image_seq_length")
    if length not in (None, image.tokens_per_tile):
        raise ValueError(f"processor_config.json's image_seq_length is {length!r}; a tile has {image.tokens_per_tile} tokens")
    return TilePreprocessor(
        image=image,
        tokens=image_tokens(files, TOKENS),
        image_token_id=image_token_id(config),
    )


def build(config: Config, preprocessor: TilePreprocessor, split: Split) -> Model:
    from vlserve.models.base import Model, build_decoder
    from vlserve.vision.internvit_tower import InternVit

    decoder = build_decoder(config, split)
    return Model(decoder, InternVit(read_encoder_config(config), preprocessor.image, decoder.config.hidden_size))


def text_preprocessor(config: Config, files: Files) -> TextPreprocessor:
    return TextPreprocessor(image_tokens(files, TOKENS))


def build_alone(config: Config, preprocessor: TextPreprocessor, split: Split) -> Model:
    from vlserve.models.base import Model, build_decoder

    return Model(build_decoder(config, split), is_alone=True)


INTERNVL = Architecture(
    preprocessor=preprocessor,
    build=build,
    encoder=read_encoder_config,
    text_model_type="qwen2",
    language_model=Architecture(preprocessor=text_preprocessor, build=build_alone, text_model_type="qwen2"),
)
