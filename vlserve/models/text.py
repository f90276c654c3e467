"""Language models without pictures: `model_type` is the decoder's own, and config.json is what others have as `text_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from vlserve.errors import RequestError
from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import READERS, is_tied, read_decoder_config
from vlserve.models.architecture import Architecture, Config, Detail, Files, Layout, Placeholder, Preprocessor, Vocabulary

if TYPE_CHECKING:
    from PIL import Image

    from vlserve.llm.stored_names import Renamed
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model
    from vlserve.vision.pixels import Pixels


@dataclass(frozen=True, slots=True)
class TextPreprocessor(Preprocessor):
    """There is no place for a picture.

    Args:
        tokens: special ones of a vision model that is served without pictures, so that texts are encoded as with them.
    """

    tokens: tuple[str, ...] = ()

    def placeholders(self) -> Mapping[str, Placeholder]:
        return {}

    def control_tokens(self) -> tuple[str, ...]:
        return self.tokens

    def prepare(self, image: Image.Image, detail: Detail) -> Pixels:
        _refuse()

    def count_features(self, width: int, height: int, detail: Detail) -> int:
        _refuse()

    def most_features(self) -> int:
        return 0

    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        _refuse()


def preprocessor(config: Config, files: Files) -> TextPreprocessor:
    return TextPreprocessor()


def build(config: Config, preprocessor: TextPreprocessor, split: Split) -> Model:
    from vlserve.llm.decoders import make_decoder
    from vlserve.llm.stored_names import own_names
    from vlserve.models.base import Model

    class TextModel(Model):
        def rename(self, name: str) -> Renamed:
            own = own_names(self.decoder.config)(name)
            return None if self.decoder.lm_head is None and own == "lm_head.weight" else own

    return TextModel(make_decoder(read_config(config), split), prefix="")


def read_config(config: Config) -> DecoderConfig:
    """Of a whole config.json; raises ValueError naming the key."""
    try:
        return read_decoder_config({**config, "tie_word_embeddings": is_tied(config, config)})
    except ValueError as error:
        raise ValueError(str(error).replace("text_config.", "")) from error


def _refuse() -> NoReturn:
    raise RequestError(
        "this model takes no pictures; a vision model does, unless it was started with --language-model-only",
        param="messages",
        code="unsupported_parameter",
    )


_ALONE = Architecture(preprocessor=preprocessor, build=build, decoder=read_config)
TEXT = replace(_ALONE, language_model=_ALONE)
TEXT_MODELS = dict.fromkeys(READERS, TEXT)
