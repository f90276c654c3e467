"""tokenizer.model without tokenizer.json: the ids of the sentencepiece package itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from vlserve.errors import ModelError
from vlserve.models.end_tokens import find_end_tokens
from vlserve.prompt.conversation import Text
from vlserve.prompt.tokenizer import Tokenizer

LINES = [
    "What shape is it? A red circle, and two blue squares.",
    "user says: it's 12 o'clock",
    "あの猫 é ✓ The picture shows",
] * 9
WORDS = ["What", "shape", "is", "it?", "A", "red", "circle", "and", "two", "blue", "squares,", "it's", "12", "o'clock"]
TEXTS = [
    *(
        "",
        " ",
        "a",
        " a",
        "a ",
        "  two   blanks ",
        "tab\tand\nlines\n\n",
        "1234567 3.14",
        "a_b-c/d",
        "<b>",
        "é 漢字 🙂",
        "e\u0301",
    ),
    *("é 漢字 🙂", "¿Qué?", "नमस्ते", "مرحبا", "\ufb01ne", "A" * 50, "\u2581", "x\u3000y", "ﾊﾝｶｸ"),
    *(" ".join(WORDS[i : i + n]) + end for i in range(6) for n in range(1, 8) for end in ("", "\n", "!!")),
]
BOS = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def train(**settings: Any) -> bytes:
    made = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["[OUT]"],
        "minloglevel": 2,
        "num_threads": 1,
    }
    lines = iter(LINES)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=made, **options | settings)
    return made.getvalue()


def save(folder: Path, model: bytes, **settings: Any) -> Any:
    """Llama-2's tokenizer_config.json beside a model; returns the model's own processor."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": BOS | {"content": "</s>"}, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize(
    "trained,settings",
    [
        ({}, {}),
        ({}, {"legacy": False}),
        ({"add_dummy_prefix": False}, {}),
        ({"normalization_rule_name": "nmt_nfkc"}, {}),
        ({"remove_extra_whitespaces": True}, {}),
        ({"byte_fallback": False, "vocab_size": 150}, {}),
    ],
    ids=str,
)
def test_ids_and_texts_equal_sentencepiece(trained: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = save(tmp_path, train(**trained), **settings)
    ours = Tokenizer(tmp_path)
    assert len(TEXTS) > 100 and ours.num_tokens == theirs.get_piece_size()
    for text in TEXTS:
        if settings and text.startswith((" ", "\u2581")):
            continue  # without `legacy` transformers puts no blank in front of one that is there
        ids = theirs.encode(text)
        assert ours.encode_plain(text, at_beginning=True) == ids, text
        if trained.get("byte_fallback", True):  # else unknown characters have one token, and no way back
            assert ours.decode(ids) == theirs.decode(ids), text


def test_special_pieces_and_what_begins_a_text(tmp_path: Path) -> None:
    theirs = save(tmp_path, train(control_symbols=["<|im_end|>"]))
    ours = Tokenizer(tmp_path)
    assert ours.beginning == [theirs.bos_id()]
    special = {name for name, token in ours.added.items() if token["special"]}
    assert special == {"<unk>", "<s>", "</s>", "<|im_end|>"} and not ours.added["[OUT]"]["special"]
    ids = ours.encode_rendered([Text("Who?"), "<|im_end|>"])
    assert ids[-1] == theirs.piece_to_id("<|im_end|>") and ids[:-1] == theirs.encode("Who?")
    assert ours.encode_plain("<|im_end|>") and theirs.piece_to_id("<|im_end|>") not in ours.encode_plain("<|im_end|>")
    assert find_end_tokens(tmp_path, {}, {}, ["<|im_end|>"]) == {theirs.eos_id(), theirs.piece_to_id("<|im_end|>")}


def test_tokens_that_are_added_to_the_pieces(tmp_path: Path) -> None:
    """As InternVL's: the ids behind the pieces' are in tokenizer_config.json only."""
    model = train()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    save(tmp_path, model, added_tokens_decoder={"420": {"content": "<IMG_CONTEXT>", **flags}})
    ours = Tokenizer(tmp_path)
    assert ours.token_id("<IMG_CONTEXT>") == 420 and ours.num_tokens == 421


@pytest.mark.parametrize(
    "content", (b"", b"version https://git-lfs", b"\xff" * 40, None), ids=("empty", "pointer", "ones", "cut")
)
def test_what_is_no_model_is_told(content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train()[:-300] if content is None else content)
    with pytest.raises(ModelError, match=r"tokenizer\.model: no SentencePiece model"):
        Tokenizer(tmp_path)


def test_another_kind_of_model_is_told(tmp_path: Path) -> None:
    save(tmp_path, train(model_type="unigram", vocab_size=300))
    with pytest.raises(ModelError, match="only SentencePiece models of kind BPE"):
        Tokenizer(tmp_path)
