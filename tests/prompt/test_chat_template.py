"""Chat templates: found where transformers finds them, with the tags, filters and variables that it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import edit_json
from tests.prompt.test_build import copy_of
from vlserve.errors import ModelError
from vlserve.prompt.chat_template import ChatTemplate
from vlserve.prompt.conversation import Message, PromptOptions, Text
from vlserve.prompt.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "description": 'é <|im_end|> "x"\n', "parameters": {}}}]
MESSAGES = [Message("user", [Text('What é <|im_start|> "x"\nis it?')], is_string=True)]
PLACES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


def rendered(folder: Path, messages: list[Message] = MESSAGES, **options: Any) -> str:
    template = ChatTemplate(folder, Tokenizer(folder))
    pieces = template.pieces(messages, PromptOptions(**options))
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


def theirs(folder: Path, **options: Any) -> str:
    """The processor's, or where it has none the tokenizer's."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    judge = processor if processor.chat_template is not None else processor.tokenizer
    given = [{"role": m.role, "content": "".join(p.text for p in m.parts if isinstance(p, Text))} for m in MESSAGES]
    text: str = judge.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **options)
    return text


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint without a chat template."""
    folder = copy_of(checkpoint(), tmp_path)
    (folder / "chat_template.jinja").unlink()
    return folder


def put(folder: Path, place: str, template: Any) -> None:
    if place.endswith(".jinja"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(template)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    else:
        edit_json(folder / place, chat_template=template)


def names(*names: str) -> dict[str, str]:
    return {name: f"{name} {{{{ tools is none }}}}" for name in names}


@pytest.mark.parametrize("first", range(4))
def test_the_first_place_that_has_one_counts(first: int, folder: Path) -> None:
    for place in PLACES[first:]:
        put(folder, place, f"{place} says: {{{{ messages[0].content }}}}")
    assert rendered(folder) == theirs(folder)
    assert rendered(folder).startswith(f"{PLACES[first]} says: What")


@pytest.mark.parametrize("place", ["processor_config.json", "tokenizer_config.json"])
def test_null_is_no_template(place: str, folder: Path) -> None:
    put(folder, place, None)
    with pytest.raises(ModelError, match="chat_template.jinja .*; download it again, or take that of"):
        rendered(folder)
    put(folder, "tokenizer_config.json", "yes")
    assert rendered(folder) == theirs(folder) == "yes"


@pytest.mark.parametrize(
    "put_them",
    [
        lambda folder: put(
            folder, "tokenizer_config.json", [{"name": n, "template": t} for n, t in names("default", "rag").items()]
        ),
        lambda folder: put(folder, "tokenizer_config.json", names("default", "rag")),
        lambda folder: put(folder, "processor_config.json", names("default", "rag")),
        lambda folder: put(folder, "chat_template.json", names("default", "rag")),
        lambda folder: [
            put(folder, "chat_template.jinja", names("default")["default"]),
            put(folder, "additional_chat_templates/rag.jinja", "rag"),
            put(folder, "tokenizer_config.json", "not this"),
        ],
    ],
    ids=["list", "dictionary", "processor", "legacy", "files"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves a file open
def test_templates_with_names(put_them: Callable[[Path], None], folder: Path) -> None:
    put_them(folder)
    assert rendered(folder) == theirs(folder) == "default True"


def test_requests_with_tools_take_the_template_for_them(folder: Path) -> None:
    put(folder, "tokenizer_config.json", names("default", "tool_use"))
    assert rendered(folder, tools=TOOLS) == theirs(folder, tools=TOOLS) == "tool_use False"
    assert rendered(folder) == theirs(folder) == "default True"


@pytest.mark.parametrize(
    ("place", "template", "message"),
    [
        (
            "tokenizer_config.json",
            {"rag": "x", "tool_use": "y"},
            "tokenizer_config.json has chat templates for rag, tool_use and none",
        ),
        ("additional_chat_templates/rag.jinja", "x", "none called default"),
        ("tokenizer_config.json", [{"template": "x"}], "chat_template of tokenizer_config.json: expected a text"),
        ("processor_config.json", 3, "chat_template of processor_config.json: expected a text"),
    ],
)
def test_what_is_no_template_is_named(place: str, template: Any, message: str, folder: Path) -> None:
    put(folder, place, template)
    with pytest.raises(ModelError, match=message):
        rendered(folder)


def test_files_that_exclude_each_other_are_named(folder: Path) -> None:
    put(folder, "chat_template.json", "x")
    put(folder, "additional_chat_templates/rag.jinja", "x")
    with pytest.raises(ModelError, match="exclude each other"):
        rendered(folder)
    with pytest.raises(ValueError, match="conflicting files"):
        theirs(folder)


TEMPLATES = [
    # LLaVA's own
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% generation %}{{ m.content + ' ' }}{% endgeneration %}{% endfor %}",
    "{% for m in messages %}\n {%- generation -%}\n {% set x = 1 %}{{ m.content }}\n {%- endgeneration %}\n{{ x }}{% endfor %}",
    "{{ messages[0].content | tojson }} {{ messages | tojson }}",
    "{{ messages[0].content | tojson(ensure_ascii=True) }} {{ messages | tojson(true, 2) }}",
    "{{ messages[0] | tojson(indent=2, separators=(',', ' : '), sort_keys=true) }}",
    "{{ {'a': messages[0].content | tojson} | tojson }}",
    "{{ (tools or []) | tojson(indent=4) }} {{ tools[0].function.description if tools }}",
    "{{ bos_token }}{{ eos_token }}{{ documents is none }}{{ documents is defined }}{{ strftime_now('%Y') }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_says_what_it_says_in_transformers(template: str, folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", bos_token={"__type": "AddedToken", "content": "<|im_start|>", "special": True})
    put(folder, "chat_template.jinja", template)
    assert rendered(folder) == theirs(folder)
    if "tools" in template:
        assert rendered(folder, tools=TOOLS) == theirs(folder, tools=TOOLS)


@pytest.mark.parametrize("template", TEMPLATES[2:6])
def test_a_text_that_is_written_as_json_is_still_a_text(template: str, folder: Path) -> None:
    put(folder, "chat_template.jinja", template)
    tokenizer = Tokenizer(folder)
    pieces = ChatTemplate(folder, tokenizer).pieces(MESSAGES, PromptOptions())
    assert all(isinstance(piece, Text) for piece in pieces)
    ids = tokenizer.encode_rendered(pieces)
    assert tokenizer.token_id("<|im_start|>") not in ids and "<|im_start|>" in tokenizer.decode(ids)
