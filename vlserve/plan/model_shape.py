"""The sizes of any model's parts, from config.json alone, also of models that vlserve cannot serve yet.

What vlserve serves is read by the readers that the engine uses; anything else is read as the generic Llama shape, as well
as its names allow. Knows nothing of ranks or memory. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vlserve.errors import ConfigError, ModelError
from vlserve.llm.config import DecoderConfig, ExpertsConfig
from vlserve.llm.config_readers import is_tied, read_decoder_config, with_defaults
from vlserve.llm.quantisation import FP8, Quantisation, find_quantisation
from vlserve.vision.config import EncoderConfig, read_encoder_config

if TYPE_CHECKING:
    from vlserve.models.architecture import Architecture, EncoderBytes, Preprocessor

SECTIONS = ("text_config", "llm_config")  # the second is OpenGVLab's internvl_chat
MAX_SIZE, MAX_HEADS = 2**31, 2**14  # a config.json beyond these is damaged
MAX_PATCHES = 12  # tiles of a picture beside its thumbnail, where config.json does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The language model; field names are config.json's where it has them."""

    section: str  # of config.json; "" for its top level
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of layers without experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    default_context: int | None  # tokens, where no max_model_len is given
    longest_context: int | None  # tokens that max_model_len may be
    limit_text: str  # the same, and where it comes from
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_sinks: bool = False
    experts: ExpertsConfig | None = None
    expert_width_key: str = "moe_intermediate_size"  # of config.json, that `experts.width` came from
    shared_intermediate_size: int = 0  # of the expert that every token passes
    feature_levels: int = 1  # of a picture: the embeddings', and one for each layer that takes its own
    quantisation: Quantisation | None = None  # None also where it is not supported

    @property
    def num_experts(self) -> int:
        """Of a layer that has some; 0 where none has."""
        return self.experts.num_experts if self.experts is not None else 0

    @property
    def has_dense_layers(self) -> bool:
        return self.experts is None or len(self.experts.layers) < self.num_hidden_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Decoder and encoder, and why vlserve cannot serve the model (`reasons` is empty when it can)."""

    decoder: DecoderShape
    encoder: EncoderConfig | None  # None where config.json does not tell
    image_tokens: int  # of the largest picture
    tokens_per_tile: int | None  # None where pictures have no tiles of one size
    preprocessor: Preprocessor | None  # None where vlserve does not know the model
    sized: Callable[[int], EncoderBytes] | None  # by bytes of a number, where the family tells it so
    counted: Architecture | None  # whose encoder only its own code knows: it is built without memory and counted
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_pictures(self) -> bool:
        return self.encoder is not None or self.sized is not None or self.counted is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The shape of the requests that are counted."""

    text_tokens: int = 512
    images: int = 1
    answer_tokens: int = 512
    tiles_per_image: int | None = None  # thumbnail included; None: of the largest picture that the model cuts


def read_model_shape(config: Mapping[str, Any], *, language_model_only: bool = False) -> ModelShape:
    """Read a whole config.json; raises ModelError naming the size that is missing or wrong."""
    from vlserve.models.registry import find_architecture  # entry points; the command line's flags need none of it

    model_type = str(config.get("model_type"))
    notes: list[str] = []
    architecture: Architecture | None = None
    preprocessor: Preprocessor | None = None
    unknown, faulty = tuple[str, ...](), tuple[str, ...]()
    try:
        architecture = find_architecture(config, language_model_only=language_model_only)
        preprocessor = architecture.preprocessor(config, {})
    except ModelError as error:
        unknown = (str(error),)
    except Exception as error:  # noqa: BLE001  (a package's code raises what it likes)
        faulty = (_said(error),)
    try:
        decoder, reasons = _decoder_and_reasons(config, architecture)
    except ModelError as error:
        raise ModelError("\n".join((*unknown, str(error)))) from error
    reasons = (*unknown, *reasons, *faulty)
    if decoder.quantisation is not None:
        notes.append(f"the decoder's linear layers are counted as {decoder.quantisation}")
        if decoder.quantisation.kind == FP8:
            notes.append("on the CPU, FP8 weights are converted to dtype when they are loaded and take its bytes")
    sees = preprocessor is None or preprocessor.most_features() > 0
    sized = _sized(config, architecture, preprocessor) if sees else None
    is_counted = sees and sized is None and architecture is not None and architecture.encoder is None
    encoder = _read_encoder(config, architecture) if sees and sized is None else None
    if sees and encoder is None and sized is None:
        notes.append("config.json does not tell the vision encoder's sizes: its activations are not counted")
    elif encoder is not None and architecture is None and model_type != "internvl_chat":
        notes.append("the vision encoder and its projector are counted as InternVL's, from vision_config's sizes")
    return ModelShape(
        decoder=decoder,
        encoder=encoder,
        image_tokens=_image_tokens(config, preprocessor, encoder),
        tokens_per_tile=_tokens_per_tile(preprocessor, encoder),
        preprocessor=preprocessor,
        sized=sized,
        counted=architecture if is_counted else None,
        reasons=reasons,
        notes=tuple(notes),
    )


def read_decoder_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Only the language model; raises ModelError naming the size that is missing or wrong."""
    from vlserve.models.registry import find_architecture

    try:
        architecture: Architecture | None = find_architecture(config)
    except ModelError:
        architecture = None
    return _decoder_and_reasons(config, architecture)[0]


def request_tokens(shape: ModelShape, request: Request) -> tuple[int, int]:
    """(tokens of a picture, tokens of the whole request with its answer); raises ConfigError for a number that is none."""
    for name in ("text_tokens", "images", "answer_tokens", "tiles_per_image"):
        value, least = getattr(request, name), 1 if name in ("answer_tokens", "tiles_per_image") else 0
        if value is not None and (not isinstance(value, int) or value < least):
            raise ConfigError(f"request {name} is {value!r}; expected a whole number of {least} or more")
    image_tokens = shape.image_tokens
    if request.tiles_per_image is not None:
        if shape.tokens_per_tile is None:
            raise ConfigError("request tiles_per_image: this model's pictures have no tiles of one size")
        image_tokens = request.tiles_per_image * shape.tokens_per_tile
    return image_tokens, request.text_tokens + request.images * image_tokens + request.answer_tokens


def _decoder_and_reasons(config: Mapping[str, Any], architecture: Architecture | None) -> tuple[DecoderShape, tuple[str, ...]]:
    section = next((name for name in SECTIONS if isinstance(config.get(name), Mapping)), "")
    text = with_defaults(config[section] if section else config)
    text["tie_word_embeddings"] = is_tied(config, text)
    shape, reasons = _with_quantisation(_generic_shape(text, section), config)
    try:
        return _exact_shape(shape, read_decoder_config(text) if architecture is None else architecture.decoder(config)), reasons
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        return shape, (_said(error).replace("text_config", section or "config.json"), *reasons)


def _with_quantisation(shape: DecoderShape, config: Mapping[str, Any]) -> tuple[DecoderShape, tuple[str, ...]]:
    try:
        quantisation = find_quantisation(config)
        if quantisation is not None:
            inputs = {"q_proj": shape.hidden_size, "o_proj": shape.num_attention_heads * shape.head_dim}
            width = shape.intermediate_size if shape.experts is None else shape.experts.width
            for name, size in (inputs | {"down_proj": width}).items():
                quantisation.check_inputs(size, name)
    except ValueError as error:
        return shape, (f"{error}; the weights are counted as if they were not quantised",)
    return replace(shape, quantisation=quantisation), ()


def _generic_shape(text: Mapping[str, Any], section: str) -> DecoderShape:
    model_type = str(text.get("model_type"))
    heads = _size(text, section, "num_attention_heads", most=MAX_HEADS)
    hidden = _size(text, section, "hidden_size")
    if hidden < heads and text.get("head_dim") is None:
        raise ModelError(
            f"config.json's hidden_size {hidden} is less than num_attention_heads {heads}; expected head_dim beside it"
        )
    layers = _size(text, section, "num_hidden_layers", most=MAX_HEADS)
    number = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None)
    width_key = "moe_intermediate_size" if text.get("moe_intermediate_size") else "intermediate_size"
    experts = None
    if number is not None:
        experts = ExpertsConfig(
            layers=tuple(range(layers)),
            num_experts=_size(text, section, number),
            top_k=_size(text, section, "num_experts_per_tok", default=1),
            width=_size(text, section, width_key),
            norm_topk_prob=True,
            bias=bool(text.get("mlp_bias")),
        )
    max_positions = _size(text, section, "max_position_embeddings", default=0) or None
    has_bias = bool(text.get("attention_bias") or text.get("bias"))
    return DecoderShape(
        section=section,
        model_type=model_type,
        vocab_size=_size(text, section, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(text, section, "intermediate_size", default=None if experts is None else experts.width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_size(text, section, "num_key_value_heads", default=heads, most=MAX_HEADS),
        head_dim=_size(text, section, "head_dim", default=hidden // heads),
        default_context=max_positions,
        longest_context=max_positions,
        limit_text=f"{max_positions} (max_position_embeddings)",
        tie_word_embeddings=text["tie_word_embeddings"],
        qkv_bias=model_type.startswith("qwen2") or has_bias or bool(text.get("qkv_bias")),
        output_bias=has_bias,
        mlp_bias=bool(text.get("mlp_bias")),
        qk_norm=model_type.startswith("qwen3"),
        experts=experts,
        expert_width_key=width_key,
        shared_intermediate_size=_size(text, section, "shared_expert_intermediate_size", default=0) if experts else 0,
    )


def _exact_shape(shape: DecoderShape, config: DecoderConfig) -> DecoderShape:
    """As the engine reads it: also what it does not look at, as a key of another decoder's, is put right."""
    return replace(
        shape,
        intermediate_size=config.intermediate_size,
        default_context=config.default_context,
        longest_context=config.longest_context,
        limit_text=config.limit_text,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        attention_sinks=config.attention_sinks,
        experts=config.experts,
        shared_intermediate_size=0,
        feature_levels=1 + len(config.deep_layers),
    )


def _size(text: Mapping[str, Any], section: str, key: str, *, default: int | None = None, most: int = MAX_SIZE) -> int:
    value = text.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        where = f"{section}.{key}" if section else key
        raise ModelError(f"config.json's {where} is {value!r}; expected a whole number from 1 to {most}")
    return value


def _read_encoder(config: Mapping[str, Any], architecture: Architecture | None) -> EncoderConfig | None:
    """The family's own reading, or the same sizes under the names of internvl_chat and of other vision transformers."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None
    read: Callable[[Mapping[str, Any]], EncoderConfig] = read_encoder_config
    given = config
    if architecture is not None and architecture.encoder is not None:
        read = architecture.encoder
    else:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if any(vision.get(key) is None for key in keys):  # another encoder's names; ours have defaults
            return None
        given = {
            "downsample_ratio": config.get("downsample_ratio", 1.0),
            "vision_config": {key: vision[key] for key in keys}
            | {"attention_bias": vision.get("qkv_bias", True), "use_qk_norm": vision.get("qk_normalization", False)}
            | {"norm_type": vision.get("norm_type", "layer_norm")}
            | ({"image_size": config["force_image_size"]} if config.get("force_image_size") else {}),
        }
    try:
        encoder = read(given)
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return None
    sizes = (encoder.hidden_size, encoder.intermediate_size, encoder.num_hidden_layers, encoder.image_size, encoder.patch_size)
    return encoder if all(0 < size <= MAX_SIZE for size in sizes) and 0.01 < encoder.downsample_ratio <= 1 else None


def _sized(
    config: Mapping[str, Any], architecture: Architecture | None, preprocessor: Preprocessor | None
) -> Callable[[int], EncoderBytes] | None:
    if architecture is None or architecture.sizes is None or preprocessor is None:
        return None
    return partial(architecture.sizes, config, preprocessor)


def _tokens_per_tile(preprocessor: Preprocessor | None, encoder: EncoderConfig | None) -> int | None:
    if preprocessor is not None:
        return preprocessor.features_per_unit()
    return encoder.tokens_per_tile if encoder is not None else 0


def _image_tokens(config: Mapping[str, Any], preprocessor: Preprocessor | None, encoder: EncoderConfig | None) -> int:
    """Of the largest picture; of a family that is not known, as InternVL would cut it."""
    if preprocessor is not None:
        return preprocessor.most_features()
    given = config.get("max_dynamic_patch", MAX_PATCHES)
    most = given if isinstance(given, int) and given > 0 else MAX_PATCHES
    is_dynamic = bool(config.get("dynamic_image_size", config.get("model_type") in ("internvl", "internvl_chat")))
    tiles = most + 1 if is_dynamic and most > 1 else 1
    return tiles * encoder.tokens_per_tile if encoder is not None else 0


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) and error.args else str(error)
