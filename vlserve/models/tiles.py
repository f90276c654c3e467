"""The front half of families whose pictures are square tiles of one size, with one block of placeholders each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.errors import RequestError
from vlserve.models.architecture import Config, Detail, Features, Files, Layout, Placeholder, Preprocessor, Vocabulary
from vlserve.vision.image_config import MAX_PATCHES, ImageConfig
from vlserve.vision.pixels import Pixels

if TYPE_CHECKING:
    from PIL import Image

# of a request or a picture, and what it is here; transformers' names, and OpenGVLab's, as vLLM and LMDeploy take them
TILE_OPTIONS = {
    **{name: name for name in ("crop_to_patches", "min_patches", "max_patches", "max_dynamic_patch")},
    "dynamic_image_size": "crop_to_patches",
    "min_dynamic_patch": "min_patches",
}


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
        return self._for(detail).num_tiles(height, width) * self.image.tokens_per_tile

    def features_per_unit(self) -> int:
        return self.image.tokens_per_tile

    def most_features(self) -> int:
        return self.image.most_tiles * self.image.tokens_per_tile

    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        start, placeholder, end = self.tokens
        places = Features(pixels.num_features, vocabulary.token_id(placeholder))
        return Layout.of([*_ids(start, vocabulary), places, *_ids(end, vocabulary)])

    def configured(self, options: Mapping[str, Any]) -> Preprocessor:
        """What transformers' processor takes for tiling, there or within `images_kwargs`, and other servers' names for it."""
        given: dict[str, Any] = {}
        params: dict[str, str] = {}
        for place, value in flat_options(options).items():
            name = TILE_OPTIONS.get(place.removeprefix("images_kwargs.")) if self.image.dynamic else None
            if name is None:
                Preprocessor.configured(self, {place: value})  # super() knows another class where there are slots
            elif value is not None:
                params[name] = f"mm_processor_kwargs.{place}"
                given[name] = _tile_option(name, value, params[name])
        if not given.get("crop_to_patches", True):
            return replace(self, image=replace(self.image, min_patches=1, max_patches=1))
        most = given.get("max_dynamic_patch", given.get("max_patches", self.image.max_patches))
        least = given.get("min_patches", self.image.min_patches)
        if "max_dynamic_patch" in given and "min_patches" not in given:
            least = min(least, most)
        param = params.get("min_patches") or params.get("max_patches")
        if param and least > most:
            raise RequestError(f"{param}: min_patches {least} is more than max_patches {most}", param=param)
        return replace(self, image=replace(self.image, min_patches=least, max_patches=most))

    def _for(self, detail: Detail) -> ImageConfig:
        """`low` is one tile."""
        return replace(self.image, dynamic=False) if detail == "low" else self.image


def flat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A request's `mm_processor_kwargs` by where they stand: those within `images_kwargs` as `images_kwargs.name`."""
    nested = options.get("images_kwargs")
    if not isinstance(nested, Mapping):
        return dict(options)
    beside = {name: value for name, value in options.items() if name != "images_kwargs"}
    return beside | {f"images_kwargs.{name}": value for name, value in nested.items()}


def _tile_option(name: str, value: Any, param: str) -> Any:
    if name == "crop_to_patches":
        if not isinstance(value, bool):
            raise RequestError(f"{param} is {repr(value)[:100]}; expected true or false", param=param)
    elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{param} is {repr(value)[:100]}; expected a whole number of 1 or more", param=param)
    elif value > MAX_PATCHES:
        raise RequestError(f"{param} is {value}; the limit is {MAX_PATCHES}", param=param)
    return value


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
    """The image processor's settings: processor_config.json's part, all of it, else a file of their own; raises ValueError."""
    nested = files.get("processor_config.json", {}).get("image_processor")
    settings = files.get("preprocessor_config.json", {}) if nested is None else nested
    if not isinstance(settings, Mapping):
        raise ValueError(f"processor_config.json's image_processor is {settings!r}; expected an object")
    return settings


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, Mapping) else token


def _ids(token: str, vocabulary: Vocabulary) -> list[int]:
    return [vocabulary.token_id(token)] if token else []
