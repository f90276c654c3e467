"""The front half of families whose pictures are square tiles of one size, with one block of placeholders each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.errors import RequestError
from vlserve.models.architecture import Config, Detail, Features, Files, Layout, Placeholder, Preprocessor, Vocabulary
from vlserve.vision.config import ImageConfig
from vlserve.vision.pixels import Pixels
from vlserve.vision.tiling import choose_grid

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePreprocessor(Preprocessor):
    """Dynamic tiling with a thumbnail, or one tile a picture.

    Args:
        tokens: before, at and after each of a picture's places: (start, placeholder, end); "" for no start or end.
        image_token_id: config.json's, of the placeholder.
    """

    image: ImageConfig
    tokens: tuple[str, str, str]
    image_token_id: Any

    def placeholders(self) -> Mapping[str, Placeholder]:
        if not isinstance(self.image_token_id, int):
            raise ValueError(f"config.json's image_token_id is {self.image_token_id!r}; expected a token id")
        return {"image": Placeholder(self.tokens[1], self.image_token_id)}

    def control_tokens(self) -> tuple[str, ...]:
        return self.tokens

    def prepare(self, image: Image.Image, detail: Detail) -> Pixels:
        from vlserve.vision.preprocess import make_tiles  # imports torch, which the front does while the rank loads

        return make_tiles(image, self._for(detail))

    def count_features(self, width: int, height: int, detail: Detail) -> int:
        config = self._for(detail)
        if not config.dynamic:
            return config.tokens_per_tile
        limits = {"min_patches": config.min_patches, "max_patches": config.max_patches}
        return choose_grid(height, width, tile_size=config.tile_size, **limits).num_tiles * config.tokens_per_tile

    def features_per_unit(self) -> int:
        return self.image.tokens_per_tile

    def most_features(self) -> int:
        most = self.image.max_patches
        return (most + 1 if self.image.dynamic and most > 1 else 1) * self.image.tokens_per_tile

    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        start, placeholder, end = self.tokens
        places = Features(pixels.num_features, vocabulary.token_id(placeholder))
        return Layout.of([*_ids(start, vocabulary), places, *_ids(end, vocabulary)])

    def configured(self, options: Mapping[str, Any]) -> Preprocessor:
        """`max_dynamic_patch`: tiles of one picture at most, the thumbnail not counted; the checkpoint's own limit stays."""
        options = dict(options)
        most = options.pop("max_dynamic_patch", None)
        Preprocessor.configured(self, options)  # super() knows another class where there are slots
        if most is None:
            return self
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            param = "mm_processor_kwargs.max_dynamic_patch"
            raise RequestError(f"{param} is {repr(most)[:100]}; expected a whole number of 1 or more", param=param)
        image = self.image
        return replace(
            self,
            image=replace(image, max_patches=min(most, image.max_patches), min_patches=min(most, image.min_patches)),
        )

    def _for(self, detail: Detail) -> ImageConfig:
        """`low` is one tile."""
        return replace(self.image, dynamic=False) if detail == "low" else self.image


def image_tokens(files: Files, defaults: tuple[str, str, str]) -> tuple[str, str, str]:
    """tokenizer_config.json's start_image_token, context_image_token and end_image_token, else `defaults`."""
    settings = files.get("tokenizer_config.json", {})
    extra = settings.get("extra_special_tokens")
    merged = {**(extra if isinstance(extra, Mapping) else {}), **settings}
    names = zip(("start", "context", "end"), defaults, strict=True)
    start, placeholder, end = (_content(merged.get(f"{place}_image_token", token)) for place, token in names)
    return start, placeholder, end


def image_token_id(config: Config) -> Any:
    """The placeholder's id; `image_token_index` is what older checkpoints call it."""
    return config.get("image_token_id", config.get("image_token_index"))


def image_processor_settings(files: Files) -> Mapping[str, Any]:
    """The image processor's settings, from processor_config.json or a file of their own."""
    return files.get("processor_config.json", {}).get("image_processor") or files.get("preprocessor_config.json", {})


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _ids(token: str, vocabulary: Vocabulary) -> list[int]:
    return [vocabulary.token_id(token)] if token else []
