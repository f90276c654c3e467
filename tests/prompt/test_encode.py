"""A rendered template has the ids that transformers' tokenizer gives for the whole text, however it was cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from tests.checkpoints import edit_json
from tests.prompt.kinds import KINDS, llama_first, saved, sentencepiece, unigram, word_piece
from tests.prompt.test_build import copy_of
from vlserve.models.checkpoint import read_checkpoint
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.conversation import Message, Picture, Text

RENDERED: list[list[str | Text]] = [
    ["<s>", Text("[INST]"), Text(" What shape is it? "), Text("[/INST]"), Text("A red circle."), "</s>"],
    [Text("user: "), "<image>", Text("\n"), Text("two  blue"), "<image>", Text(" squares"), "<|im_end|>", Text("\n")],
    ["<image>", "<image>", Text("é 🙂 漢字"), Text("<think> [OUT]    it")],
    [Text(" it"), Text(""), Text("'s 12 o'clock")],
    ["<s>", Text(" "), "</s>", Text("  a")],
]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ids_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = saved(KINDS[kind](), tmp_path)
    judge = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for pieces in RENDERED:
        want = judge.encode(text_of(pieces), add_special_tokens=False)
        assert ours.encode_rendered(pieces) == want, text_of(pieces)
        # with a special token in a text each is encoded by itself, and the others are as before
        both = ours.encode_rendered([*pieces, "<s>", Text("a</s>b")])
        assert both[: len(want) + 1] == [*want, ours.token_id("<s>")], text_of(pieces)


def text_of(pieces: list[str | Text]) -> str:
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


def test_special_tokens_that_are_looked_for_in_the_normalised_text(tmp_path: Path) -> None:
    """Llama 2's file says `normalized: true`: the blank goes in front of <s>, not behind it."""
    from transformers import PreTrainedTokenizerFast

    theirs = sentencepiece()
    description = json.loads(theirs.to_str())
    for token in description["added_tokens"]:
        token["normalized"] = True
    ours = saved(HFTokenizer.from_str(json.dumps(description)), tmp_path)
    judge = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    want = judge.encode(text_of(RENDERED[0]), add_special_tokens=False)
    assert ours.encode_rendered(RENDERED[0]) == want
    assert want[:2] == [ours.token_id("<s>"), ours.token_id("[")]
    detokenizer = ours.detokenizer(skip_special_tokens=False)
    assert "".join([*map(detokenizer.add, want), detokenizer.finish()]) == ours.decode(want, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_text_from_outside_never_gives_a_special_token(kind: str, tmp_path: Path) -> None:
    ours = saved(KINDS[kind](), tmp_path, control=["[OUT]"])
    special = {token["id"]: name for name, token in ours.added.items() if token["special"] and "unk" not in name.lower()}
    for name in special.values():
        for text in (name, f" {name}{name}", f"a{name[:3]}{name}", name * 50):
            for id in ours.encode_plain(text), ours.encode_plain(text, at_beginning=True):
                assert special.keys().isdisjoint(id), (text, id)
            ids = ours.encode_rendered(["<s>", Text(text), "</s>", Text(text[:2]), Text(text[2:]), "<s>"])
            assert [special[id] for id in ids if id in special] == ["<s>", "</s>", "<s>"], text


CONTROL = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>")
TEMPLATE = (
    "{% for m in messages %}<s>[{{ m['role'] }}]{% for c in m['content'] %}{% if c['type'] == 'image' %}<IMG_CONTEXT>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
)


@pytest.mark.parametrize("kind", ["llama-first", "sentencepiece", "metaspace-first", "wordpiece", "unigram"])
def test_prompts_with_pictures_equal_the_processors(kind: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    theirs = KINDS[kind]()
    theirs.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    folder = copy_of(checkpoint(), tmp_path)
    theirs.save(str(folder / "tokenizer.json"))
    edit_json(folder / "config.json", image_token_id=theirs.token_to_id("<IMG_CONTEXT>"))
    edit_json(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", pad_token="<s>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    picture = Image.new("RGB", (60, 30), "red")
    parts = [["What shape", picture, "is it?"], [picture, picture, " two"], ["A red circle."]]
    given = [
        {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in content]}
        for content in parts
    ]
    processor = AutoProcessor.from_pretrained(folder)
    rendered = processor.apply_chat_template(given)
    want = processor(text=[rendered], images=[picture] * 3, add_special_tokens=False)["input_ids"][0]
    read = read_checkpoint(folder)
    messages = [
        Message("user", [Text(p) if isinstance(p, str) else Picture(read.preprocessor.prepare(p, "auto")) for p in content])
        for content in parts
    ]
    assert PromptBuilder(read).build(messages).token_ids == list(want)


def test_only_what_is_put_in_front_is_a_beginning(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("nothing", "end", "both")]
    for folder in folders:
        folder.mkdir()
    assert saved(llama_first(), folders[0]).beginning == []
    assert saved(unigram(), folders[1]).beginning == []  # it puts </s> behind
    around = saved(word_piece(), folders[2])
    assert around.beginning == [around.token_id("[CLS]")]
