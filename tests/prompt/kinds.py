"""A small tokenizer of each kind that checkpoints have, trained on a few lines, with special and added tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlserve.prompt import tokenizer as ours

LINES = ["What shape is it? A red circle, and two blue squares.", "[INST] user says: it's 12 o'clock [/INST]", "あの猫 é ✓"] * 3
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>", "<image>")
ADDED = ("<think>", "[OUT]", "    ")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    return _finished(tokenizer)


def _bpe(
    normalizer: normalizers.Normalizer | None, pre: pre_tokenizers.PreTokenizer | None, decoder: decoders.Decoder
) -> Tokenizer:
    """SentencePiece-style BPE with bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre if pre is not None else pre_tokenizers.Metaspace("▁", "never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.decoder = decoder
    description = json.loads(_finished(tokenizer).to_str())
    if pre is None:
        description["pre_tokenizer"] = None
    # the trainer makes added tokens of them; published files have the bytes in the vocabulary alone
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(description))


def sentencepiece() -> Tokenizer:
    """As older Llama files are: the blanks by a normalizer."""
    return _bpe(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, LLAMA_DECODER)


def llama_first() -> Tokenizer:
    """As transformers writes Llama's now."""
    return _bpe(None, pre_tokenizers.Metaspace("▁", "first", split=False), LLAMA_DECODER)


def gemma() -> Tokenizer:
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _bpe(normalizers.Replace(" ", "▁"), None, decoder)


def metaspace(scheme: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        return _bpe(None, pre_tokenizers.Metaspace("▁", scheme), decoders.Metaspace("▁", scheme))

    return make


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return _finished(tokenizer)


def unigram() -> Tokenizer:
    """As T5's: special tokens are pieces too, and an end is put behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    end = [("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    return _finished(tokenizer)


def word_ends() -> Tokenizer:
    """BPE with a mark at the end of each word, as CLIP's text tower has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _finished(tokenizer)


def no_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(LINES, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return _finished(tokenizer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "llama-first": llama_first,
    "gemma": gemma,
    **{f"metaspace-{scheme}": metaspace(scheme) for scheme in ("first", "always", "never")},
    "wordpiece": word_piece,
    "unigram": unigram,
    "word-ends": word_ends,
    "no-decoder": no_decoder,
}


def saved(tokenizer: Tokenizer, folder: Path, control: Sequence[str] = ()) -> ours.Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return ours.Tokenizer(folder, control)
