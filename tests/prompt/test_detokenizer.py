"""Any sequence of ids decodes, and the pieces that are streamed are together what decoding at once gives."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders

from tests.prompt.kinds import KINDS, saved, sentencepiece
from vlserve.prompt.detokenizer import TokenDecoder
from vlserve.prompt.tokenizer import Tokenizer

NUM_SEQUENCES = int(os.environ.get("VLSERVE_TEST_SEQUENCES", "150"))  # of each kind; 20000 take minutes


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[HFTokenizer, Tokenizer]]:
    made = {kind: make() for kind, make in KINDS.items()}
    return {kind: (theirs, saved(theirs, tmp_path_factory.mktemp(kind))) for kind, theirs in made.items()}


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.add(id) for id in ids), detokenizer.finish()]


def random_ids(rng: random.Random, theirs: HFTokenizer) -> list[int]:
    """Of the whole vocabulary and ten ids beyond it; some sequences mostly of bytes, or of special and added tokens."""
    size = theirs.get_vocab_size(with_added_tokens=True)
    everything = range(size + 10)
    few = [id for token, id in theirs.get_vocab().items() if token.startswith("<") or len(token) == 1]
    pool = rng.choice((everything, few))
    return [rng.choice(pool if rng.random() < 0.8 else everything) for _ in range(rng.randint(1, 24))]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_what_decoding_at_once_gives(kind: str, tokenizers: dict[str, tuple[HFTokenizer, Tokenizer]]) -> None:
    theirs, ours = tokenizers[kind]
    rng = random.Random(kind)
    for number in range(NUM_SEQUENCES):
        ids, skip = random_ids(rng, theirs), rng.random() < 0.5
        want = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == want
        assert "".join(streamed(ours, ids, skip=skip)) == want, (number, ids, skip)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_decoded_with_few_others(
    kind: str, tokenizers: dict[str, tuple[HFTokenizer, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole answer again for each token would take minutes for a long one."""
    theirs, ours = tokenizers[kind]
    decoded, text = 0, TokenDecoder.text

    def counted(self: TokenDecoder, tokens: list[str]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return text(self, tokens)

    monkeypatch.setattr(TokenDecoder, "text", counted)
    ids = [random.Random(0).randrange(theirs.get_vocab_size()) for _ in range(2000)]
    streamed(ours, ids)
    assert decoded <= 6 * len(ids)


def test_words_come_as_soon_as_they_are_whole(tokenizers: dict[str, tuple[HFTokenizer, Tokenizer]]) -> None:
    _, ours = tokenizers["sentencepiece"]
    ids = [ours.token_id(token) for token in ("▁it", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁", "<0xC3>", "▁it")]
    assert streamed(ours, ids) == ["it", "", "", "", "", "🙂 ", "", "\ufffd it", ""]


def test_a_decoder_that_looks_back_is_waited_for(tmp_path: Path) -> None:
    """This one cuts blanks at the end, which every next token may bring."""
    theirs = sentencepiece()
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    ours = saved(theirs, tmp_path)
    ids = [ours.token_id(token) for token in ("▁it", "▁", "▁it", "▁")]
    assert streamed(ours, ids) == ["", "", "", "", theirs.decode(ids)]


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"word-ends"}))
def test_bytes_of_a_token(kind: str, tokenizers: dict[str, tuple[HFTokenizer, Tokenizer]]) -> None:
    """All tokens' bytes together are the text's, but for a blank at its beginning."""
    _, ours = tokenizers[kind]
    ids = ours.encode_plain("it's a red circle é ✓", at_beginning=True)
    together = b"".join(map(ours.bytes_of, ids))
    assert together.decode().lstrip(" ") == ours.decode(ids, skip_special_tokens=False)
    assert ours.bytes_of(10**6) == b""
