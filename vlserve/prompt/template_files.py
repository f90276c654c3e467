"""Where a checkpoint's chat templates are. transformers' order of places; several templates have names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlserve.errors import ModelError

ADDITIONAL = "additional_chat_templates"


def read_templates(folder: Path, settings: Mapping[str, Any], own: str | None = None) -> dict[str, str]:
    """Templates by name, `default` among them; `settings` is tokenizer_config.json. Raises ModelError.

    The first place that has any counts: processor_config.json, chat_template.json, then chat_template.jinja together with
    additional_chat_templates/NAME.jinja, then `own`, the family's, and last tokenizer_config.json, which knows no pictures
    where a family has its own.
    """
    additional = {path.stem: path for path in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    legacy = _read_json(folder / "chat_template.json").get("chat_template")
    if legacy is not None and additional:
        raise ModelError(
            f"{folder}: chat_template.json and {ADDITIONAL}/ exclude each other, as in transformers; "
            "replace chat_template.json by a chat_template.jinja"
        )
    files = additional | ({"default": main} if (main := folder / "chat_template.jinja").exists() else {})
    places = {
        "processor_config.json": _read_json(folder / "processor_config.json").get("chat_template"),
        "chat_template.json": legacy,
        "chat_template.jinja": {name: path.read_text(encoding="utf-8") for name, path in files.items()} or None,
        "config.json": own,
        "tokenizer_config.json": settings.get("chat_template"),
    }
    place, given = next(((place, given) for place, given in places.items() if given is not None), ("", None))
    if given is None:
        raise ModelError(
            f"{folder}: checkpoint file missing: chat_template.jinja (and no chat_template in tokenizer_config.json); download "
            "it again, or take that of the model it was made from"
        )
    templates = _by_name(given, f"{folder}: chat_template of {place}")
    if "default" not in templates:
        raise ModelError(f"{folder}: {place} has chat templates for {', '.join(sorted(templates))} and none called default")
    return templates


def _by_name(given: Any, place: str) -> dict[str, str]:
    """One template, a list of {name, template}, or templates by name."""
    if isinstance(given, list) and all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in given):
        given = {entry["name"]: entry["template"] for entry in given}
    templates = {"default": given} if isinstance(given, str) else given
    if not isinstance(templates, Mapping) or not all(isinstance(text, str) for text in templates.values()):
        raise ModelError(f"{place}: expected a text, texts by name, or a list of objects with name and template")
    return dict(templates)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ModelError(f"{path}: expected a JSON object")
    return value
