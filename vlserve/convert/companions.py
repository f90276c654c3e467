"""The files beside weights and config.json in the other format: tokenizer, processor, chat templates, stops."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2

from vlserve.convert.settings import tiles_of
from vlserve.models.checkpoint import Checkpoint
from vlserve.models.companion_files import companion_files, copy_companions
from vlserve.models.internvl_chat import CONVERSATIONS, TOKENS
from vlserve.models.tokenizer_files import MERGES, MODEL, QWEN2, VOCABULARY, read_description, read_settings
from vlserve.prompt.chat_template import render
from vlserve.prompt.template_files import ADDITIONAL, read_templates
from vlserve.vision.image_config import IMAGENET_MEAN, IMAGENET_STD

VIDEO = "<video>"
FAST, FAST_OF_5 = "PreTrainedTokenizerFast", "TokenizersBackend"  # which earlier transformers do not know
PROCESSOR = "InternVLProcessor"
_MADE_ANEW = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json", MODEL),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", "vlserve_shards.json", "report.json"),
)
_PLACES = {f"{place}_image_token": token for place, token in zip(("start", "context", "end"), TOKENS, strict=True)}
_EXTRA = _PLACES | {"video_token": VIDEO}
_LEFT_OUT = ("auto_map", "backend", "chat_template")
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_BEGINNING = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
_SYSTEM = {"role": "system", "content": "S."}


def write_hf(checkpoint: Checkpoint, out: Path) -> None:
    """For transformers: an InternVLProcessor's files, and a fast tokenizer's."""
    description = _with_video(read_description(checkpoint.folder))
    _write_common(checkpoint, out, description)
    settings = _settings(checkpoint.folder, _LEFT_OUT)
    has_words = settings.get("tokenizer_class") in QWEN2 and all((out / name).exists() for name in (VOCABULARY, MERGES))
    settings |= {
        **_EXTRA,
        "added_tokens_decoder": _decoder(description),
        "extra_special_tokens": _EXTRA,
        "padding_side": "left",
        "processor_class": PROCESSOR,
        "tokenizer_class": QWEN2[0] if has_words else FAST,
    }
    settings.pop("additional_special_tokens", None)  # which extra_special_tokens excludes in some versions
    _write(out / "tokenizer_config.json", settings)
    image = tiles_of(checkpoint).image
    low, high = (image.min_patches, image.max_patches) if image.dynamic else (1, 1)
    size = {"height": image.tile_size, "width": image.tile_size}
    pixels = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3, "rescale_factor": 1 / 255, "size": size}
    pixels |= dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True)
    _write(
        out / "preprocessor_config.json",
        pixels
        | {
            "crop_to_patches": True,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": high,
            "min_patches": low,
            "processor_class": PROCESSOR,
        },
    )
    _write(out / "video_preprocessor_config.json", pixels | {"video_processor_type": "InternVLVideoProcessor"})
    _write(out / "processor_config.json", {"image_seq_length": image.tokens_per_tile, "processor_class": PROCESSOR})


def write_original(checkpoint: Checkpoint, out: Path) -> None:
    """For OpenGVLab's own code: its CLIP-like image processor's file, and ids of tokens in plain sight."""
    description = read_description(checkpoint.folder)
    _write_common(checkpoint, out, description)
    settings = _settings(checkpoint.folder, (*_LEFT_OUT, *_EXTRA, "extra_special_tokens", "processor_class"))
    _write(out / "tokenizer_config.json", settings | {"added_tokens_decoder": _decoder(description)})
    side = tiles_of(checkpoint).image.tile_size
    _write(
        out / "preprocessor_config.json",
        {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "resample": 3,
            "size": side,
        },
    )


def choose_conversation(checkpoint: Checkpoint) -> tuple[str, bool]:
    """(the `template` of config.json that writes turns as the chat template does, whether it writes all alike).

    One that differs only where a request has no system message is the next best; where no turns are alike, it is what ends them.
    """
    settings = read_settings(checkpoint.folder)
    source = read_templates(checkpoint.folder, settings)["default"]
    wanted = [_rendered(source, messages, settings) for messages in (_BEGINNING, [_SYSTEM, *_BEGINNING])]
    written = {}
    for name, conversation in CONVERSATIONS.items():
        written[name] = [_rendered(conversation.template(), m, settings) for m in (_BEGINNING, [_SYSTEM, *_BEGINNING])]
    for name, found in written.items():
        if found == wanted:
            return name, True
    for name, found in written.items():
        if found[1] == wanted[1]:
            return name, False
    tokens = {token["content"]: token["id"] for token in read_description(checkpoint.folder).get("added_tokens", ())}
    ends = {name: tokens.get(one.end.strip()) for name, one in reversed(CONVERSATIONS.items())}
    return next((name for name, id in ends.items() if id in checkpoint.end_token_ids), next(iter(ends))), False


def _rendered(source: str, messages: list[dict[str, str]], settings: Mapping[str, Any]) -> str | None:
    """None where it refuses them."""
    named = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    try:
        return render(source, messages, **named).removeprefix(named.get("bos_token", ""))
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def _write_common(checkpoint: Checkpoint, out: Path, description: Mapping[str, Any]) -> None:
    """What both formats have: tokenizer.json, the vocabulary's own files, chat templates, stops, licences."""
    folder = checkpoint.folder
    kept = [path for path in companion_files(folder) if str(path) not in _MADE_ANEW and path.parts[0] != ADDITIONAL]
    copy_companions(kept, folder, out)
    _write(out / MODEL, description)
    _write(out / "added_tokens.json", {token["content"]: token["id"] for token in description.get("added_tokens", ())})
    templates = read_templates(folder, read_settings(folder), checkpoint.preprocessor.chat_template())
    for name, source in templates.items():
        path = out / ("chat_template.jinja" if name == "default" else f"{ADDITIONAL}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    generation = {key: value for key, value in checkpoint.generation.items() if key != "_from_model_config"}
    _write(out / "generation_config.json", generation | {"eos_token_id": sorted(checkpoint.end_token_ids)})


def _with_video(description: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' processor asks for a token of videos; OpenGVLab's own '-HF' editions add it as the next id."""
    added = list(description.get("added_tokens", ()))
    if any(token["content"] == VIDEO for token in added):
        return dict(description)
    vocabulary = description["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
    id = max([*ids, *(token["id"] for token in added)]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {**description, "added_tokens": [*added, {"id": id, "content": VIDEO, **flags}]}


def _settings(folder: Path, left_out: Collection[str]) -> dict[str, Any]:
    """tokenizer_config.json in part, its class by the name that all versions of transformers know."""
    kept = {key: value for key, value in read_settings(folder).items() if key not in left_out}
    return kept | ({"tokenizer_class": FAST} if kept.get("tokenizer_class") == FAST_OF_5 else {})


def _decoder(description: Mapping[str, Any]) -> dict[str, Any]:
    return {str(token["id"]): {flag: token[flag] for flag in _FLAGS} for token in description.get("added_tokens", ())}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
