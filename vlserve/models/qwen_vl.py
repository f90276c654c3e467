"""What the Qwen-VL families share: pictures of any size, positions of three parts, and the layouts of config.json.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL differ in their encoders and decoders (qwen2_vl.py, qwen2_5_vl.py, qwen3_vl.py). No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlserve.errors import RequestError
from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import read_text_config
from vlserve.models.architecture import (
    Architecture,
    Config,
    Detail,
    EncoderBytes,
    Features,
    Files,
    Layout,
    Placeholder,
    Positions,
    Preprocessor,
    Span,
    Vocabulary,
)
from vlserve.models.text import TextPreprocessor
from vlserve.models.tiles import flat_options, image_processor_settings
from vlserve.vision.native_config import NativeConfig, read_native_config, smart_resize
from vlserve.vision.pixels import Pixels
from vlserve.vision.qwen_config import QwenVisionConfig

if TYPE_CHECKING:
    from PIL import Image

    from vlserve.llm.stored_names import Renamed
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model
    from vlserve.vision.tower import Tower

PICTURE, VIDEO = "<|image_pad|>", "<|video_pad|>"
AROUND = ("<|vision_start|>", "<|vision_end|>")  # which the chat template writes
CONTROL_TOKENS = (PICTURE, VIDEO, *AROUND)
IMAGE_ID = 151655  # where config.json does not say
# of a request or a picture, and what it is here; the names of transformers and of qwen-vl-utils
_OPTIONS = {
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "size.shortest_edge": "min_pixels",
    "size.longest_edge": "max_pixels",
    "resized_height": "resized_height",
    "resized_width": "resized_width",
}
_ROPE = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenPreprocessor(Preprocessor):
    """A picture is one unit, resized to whole features; one block of placeholders stands for it."""

    image: NativeConfig
    image_token_id: Any
    most_pixels: int  # that a request may ask for: the checkpoint's own

    def placeholders(self) -> Mapping[str, Placeholder]:
        if not isinstance(self.image_token_id, int):
            raise ValueError(f"config.json's image_token_id is {self.image_token_id!r}; expected a token id")
        return {"image": Placeholder(PICTURE, self.image_token_id)}

    def control_tokens(self) -> tuple[str, ...]:
        return CONTROL_TOKENS

    def prepare(self, image: Image.Image, detail: Detail) -> Pixels:
        from vlserve.vision.native_pixels import resize_picture  # imports torch, which the front does while the rank loads

        self.count_features(image.width, image.height, detail)
        return resize_picture(image, self._for(detail))

    def count_features(self, width: int, height: int, detail: Detail) -> int:
        config = self._for(detail)
        try:
            return config.unit(*config.size_of(height, width)).num_features
        except ValueError as error:
            raise RequestError(str(error), code="invalid_image") from error

    def most_features(self) -> int:
        return self.image.most_features

    def layout(self, pixels: Pixels, vocabulary: Vocabulary) -> Layout:
        return Layout.of([Features(pixels.num_features, self.image_token_id)])

    def positions(self, token_ids: Sequence[int], spans: Sequence[Span]) -> Positions | None:
        """Text on all three axes alike; of a picture, time stands still, and rows and columns of features are counted from where
        it begins. What follows stands behind the longer side. Source: get_rope_index of transformers."""
        if not spans:
            return None
        time, down, across = axes = list[int](), list[int](), list[int]()
        following = 0
        for span in spans:
            following = _add_text(axes, following, span.start - len(time))
            for unit in span.pixels.units:
                rows, columns = (side // self.image.factor for side in unit.shape[-2:])
                time += [following] * (rows * columns)
                down += [following + row for row in range(rows) for _ in range(columns)]
                across += list(range(following, following + columns)) * rows
                following += max(rows, columns)
        return Positions(axes=axes, next=_add_text(axes, following, len(token_ids) - len(time)))

    def configured(self, options: Mapping[str, Any]) -> Preprocessor:
        """`min_pixels` and `max_pixels`, or `size` with shortest_edge and longest_edge; and qwen-vl-utils' `resized_height` with
        `resized_width`. Where `max_pixels` alone is below the checkpoint's min_pixels, that gives way."""
        given: dict[str, int] = {}
        params: dict[str, str] = {}
        for place, value in _flat_sizes(flat_options(options)).items():
            name = _OPTIONS.get(place.removeprefix("images_kwargs."))
            if name is None:
                Preprocessor.configured(self, {place: value})  # super() knows another class where there are slots
            elif value is not None:
                params[name] = f"mm_processor_kwargs.{place}"
                given[name] = self._option(name, value, params[name])
        return replace(self, image=_resized(_limited(self.image, given, params), given, params)) if given else self

    def _option(self, name: str, value: Any, param: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RequestError(f"{param} is {repr(value)[:100]}; expected a whole number of 1 or more", param=param)
        if value > self.most_pixels:
            raise RequestError(f"{param} is {value}; the model's own limit is {self.most_pixels} pixels", param=param)
        return value

    def _for(self, detail: Detail) -> NativeConfig:
        return self.image.low() if detail == "low" else self.image


def _add_text(axes: Sequence[list[int]], following: int, number: int) -> int:
    """So many tokens that follow one another; returns where the next one stands."""
    for axis in axes:
        axis += range(following, following + number)
    return following + number


def _flat_sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    """With the keys of `size` beside the others."""
    found: dict[str, Any] = {}
    for place, value in options.items():
        is_size = place.removeprefix("images_kwargs.") == "size" and isinstance(value, Mapping)
        found |= {f"{place}.{key}": edge for key, edge in value.items()} if is_size else {place: value}
    return found


def _limited(image: NativeConfig, given: Mapping[str, int], params: Mapping[str, str]) -> NativeConfig:
    least, most = given.get("min_pixels", image.min_pixels), given.get("max_pixels", image.max_pixels)
    if "min_pixels" in given and least > most:
        param = params["min_pixels"]
        raise RequestError(f"{param}: min_pixels {least} is more than max_pixels {most}", param=param)
    return image.with_limits(least, most)


def _resized(image: NativeConfig, given: Mapping[str, int], params: Mapping[str, str]) -> NativeConfig:
    sides = [name for name in ("resized_height", "resized_width") if name in given]
    if not sides:
        return image
    if len(sides) == 1:
        param = params[sides[0]]
        raise RequestError(f"{param} needs the other one of resized_height and resized_width beside it", param=param)
    height, width = (given[name] for name in sides)
    try:
        smart_resize(height, width, image.factor, image.min_pixels, image.max_pixels)
    except ValueError as error:
        raise RequestError(f"{params[sides[0]]}: {error}", param=params[sides[0]]) from error
    return replace(image, resized=(height, width))


def make_preprocessor(config: Config, files: Files, vision: QwenVisionConfig, published: Mapping[str, Any]) -> QwenPreprocessor:
    """`published`: the settings of the family's image processor, where no file has them."""
    encoder = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    image = read_native_config(image_processor_settings(files), encoder=encoder, published=published)
    return QwenPreprocessor(image=image, image_token_id=config.get("image_token_id", IMAGE_ID), most_pixels=image.max_pixels)


def encoder_bytes(vision: QwenVisionConfig, preprocessor: QwenPreprocessor, itemsize: int) -> EncoderBytes:
    """With the largest picture."""
    peak = vision.peak_bytes(preprocessor.image.max_pixels // preprocessor.image.factor**2, itemsize)
    return EncoderBytes(vision.num_parameters * itemsize, peak)


def read_qwen_text(config: Config, model_type: str, defaults: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder, and its rotary settings as they are stored.

    Args:
        config: a whole config.json: with a `text_config`, or, as Qwen2-VL and Qwen2.5-VL are published, with its keys at the top.
        model_type: of the decoder, as config_readers.py names it. defaults: transformers', for keys that are missing.

    Raises ValueError naming the key.
    """
    given, section = config.get("text_config"), "text_config."
    if given is None:
        given, section = config, ""
    if not isinstance(given, Mapping):
        raise ValueError(f"text_config is {given!r}; expected an object")
    text = {**defaults, **{key: value for key, value in given.items() if value is not None}, "model_type": model_type}
    key = next((key for key in _ROPE if text.get(key)), _ROPE[0])
    text[key] = rope = _plain_rope(text.get(key) or {}, f"{section}{key}")
    whole = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | {"text_config": text}
    if section:  # read_text_config tells what stands beside it without effect
        whole |= {name: _plain_rope(config[name], name) for name in _ROPE if config.get(name)}
        whole |= {name: config[name] for name in ("rope_theta", "max_position_embeddings") if config.get(name)}
    try:
        return read_text_config(whole), rope
    except ValueError as error:
        raise ValueError(str(error).replace("text_config.", section)) from error


def _plain_rope(rope: Any, where: str) -> dict[str, Any]:
    """With a type that rotary embeddings have: `mrope` says that sections stand beside it."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where} {rope!r} is not supported; expected an object")
    kinds = {key: "default" if rope[key] == "mrope" else rope[key] for key in ("type", "rope_type") if rope.get(key) is not None}
    return {**rope, **kinds}


def read_sections(rope: Mapping[str, Any], default: Sequence[int], decoder: DecoderConfig, *, interleaved: bool) -> list[int]:
    """`mrope_section`: frequencies that turn by time, by row and by column; raises ValueError where they are not all."""
    given = rope.get("mrope_interleaved", interleaved)
    if given != interleaved:
        raise ValueError(f"mrope_interleaved {given!r} is not supported; supported: {interleaved}")
    sections = rope.get("mrope_section", default)
    is_whole = isinstance(sections, (list, tuple)) and all(type(number) is int and number > 0 for number in sections)
    if not is_whole or len(sections) != 3 or sum(sections) != decoder.head_dim // 2:
        raise ValueError(f"mrope_section is {sections!r}; expected three numbers, {decoder.head_dim // 2} in all (head_dim / 2)")
    return list(sections)


def alone(decoder: Callable[[Config], DecoderConfig]) -> Architecture:
    """A family without pictures: of a text, all parts of a position are the same."""

    def plain(config: Config) -> DecoderConfig:
        return replace(decoder(config), mrope_axes=())

    def preprocessor(config: Config, files: Files) -> TextPreprocessor:
        return TextPreprocessor(CONTROL_TOKENS)

    def build(config: Config, preprocessor: TextPreprocessor, split: Split) -> Model:
        return make_model(plain(config), split)

    return Architecture(preprocessor=preprocessor, build=build, decoder=plain)


def make_model(decoder: DecoderConfig, split: Split, tower: Tower | None = None, out_size: int | None = None) -> Model:
    """With the names of older checkpoints: `visual.`, `model.layers.`; and newer: `model.visual.`, `model.language_model.`."""
    from vlserve.llm.decoders import make_decoder
    from vlserve.models.base import Model

    if tower is not None and out_size != decoder.hidden_size:
        raise ValueError(f"the encoder gives features of {out_size} (vision_config), and the decoder takes {decoder.hidden_size}")

    class QwenVL(Model):
        def rename(self, name: str) -> Renamed:
            if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
                name = "language_model." + name
            return super().rename(name)

    return QwenVL(make_decoder(decoder, split), tower, is_alone=tower is None)
