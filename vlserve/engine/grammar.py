"""Grammars of requests inside the engine: compiled in worker threads, then one matcher a request.

A step never waits for a compilation. Shapes: V vocabulary, W words of 32 tokens, R rows of a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from vlserve.config import StructuredOutput
from vlserve.errors import VLServeError
from vlserve.kernels.upload import pinned
from vlserve.models.tokenizer_files import read_description
from vlserve.prompt.byte_level import bytes_of_token
from vlserve.structured.grammar import COMPILE_LIMIT_S, is_json, to_grammar

if TYPE_CHECKING:
    import xgrammar

log = logging.getLogger(__name__)
CACHE_BYTES = 256 * 2**20  # of compiled grammars
NUM_WORKERS = 2
# of this thread's time that a request may take: for one token, and on average once it has taken a while
TOKEN_LIMIT_S, MEAN_LIMIT_S, BEFORE_MEAN_S = 1.0, 0.03, 5.0


class Grammar:
    """One request's: `is_ready` once it is compiled, or `error` says why not."""

    def __init__(self, compile: Callable[[], _Compiled], workers: ThreadPoolExecutor) -> None:
        self._asked = time.monotonic()
        self._compiled = workers.submit(compile)
        self._last_byte: int | None = None
        self._num_calls, self._used_s, self._last_s = 0, 0.0, 0.0
        self.is_finished = False  # nothing may follow any more

    @property
    def is_ready(self) -> bool:
        return self._compiled.done() and self._compiled.exception() is None

    @property
    def error(self) -> str | None:
        if not self._compiled.done():
            late = time.monotonic() - self._asked > COMPILE_LIMIT_S
            return f"the grammar took longer than {COMPILE_LIMIT_S:g} s to compile" if late else None
        error = self._compiled.exception()
        if error is None:
            return None
        return str(error) if isinstance(error, VLServeError) else f"the grammar could not be compiled: {type(error).__name__}"

    def cancel(self) -> None:
        """Do not compile it any more; without effect once that has begun."""
        self._compiled.cancel()

    def fill(self, bitmask: torch.Tensor, row: int) -> None:
        """Set bit t of bitmask[row] ([R, W] int32) when token t may come next. Raises RuntimeError when none may."""
        compiled = self._compiled.result()
        self._timed(lambda: compiled.matcher.fill_next_token_bitmask(bitmask, row))
        self._check_time()
        bitmask[row] &= compiled.allowed
        if self._last_byte in compiled.vocabulary.following:
            bitmask[row] &= compiled.vocabulary.following[self._last_byte]
        if not bitmask[row].any():
            raise RuntimeError("no token of the vocabulary fits the grammar here")

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False when the grammar does not allow it."""
        compiled = self._compiled.result()
        try:
            accepted = self._timed(lambda: compiled.matcher.accept_token(token_id))
            self.is_finished = compiled.matcher.is_terminated()
        except RuntimeError:
            log.exception("a grammar failed")
            return False
        token = compiled.vocabulary.tokens[token_id]
        self._last_byte = token[-1] if token else None
        return accepted

    def _timed(self, call: Callable[[], bool]) -> bool:
        begun = time.thread_time()
        result = call()
        self._last_s = time.thread_time() - begun
        self._num_calls, self._used_s = self._num_calls + 1, self._used_s + self._last_s
        return result

    def _check_time(self) -> None:
        """An ambiguous grammar may take longer with every token: then it ends before it holds up the others for long."""
        mean = 2 * self._used_s / self._num_calls  # there are two calls for each token
        if self._last_s > TOKEN_LIMIT_S or (self._used_s > BEFORE_MEAN_S and mean > MEAN_LIMIT_S):
            raise RuntimeError(f"the grammar takes too long, {mean:.3f} s a token")


class GrammarCompiler:
    """Made once; costs nothing until the first request that needs it."""

    def __init__(
        self, folder: Path, *, vocab_size: int, end_token_ids: frozenset[int], feature_token_ids: frozenset[int]
    ) -> None:
        self.folder, self._vocab_size = folder, vocab_size
        self._end_token_ids, self._feature_token_ids = end_token_ids, feature_token_ids
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="vlserve-grammar")
        self._lock = threading.Lock()
        self._made: tuple[xgrammar.GrammarCompiler, Vocabulary] | None = None

    def start(self, structured: StructuredOutput) -> Grammar:
        """Begin to compile; returns at once."""
        return Grammar(lambda: self.compile(structured), self._workers)

    def compile(self, structured: StructuredOutput) -> _Compiled:
        """In a worker thread: a new matcher, with what it needs of the vocabulary."""
        import xgrammar

        compiler, vocabulary = self._compiler()
        matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(to_grammar(structured)))
        return _Compiled(
            matcher=matcher, vocabulary=vocabulary, allowed=vocabulary.clean if is_json(structured) else vocabulary.text
        )

    def _compiler(self) -> tuple[xgrammar.GrammarCompiler, Vocabulary]:
        import xgrammar

        with self._lock:
            if self._made is None:
                tokens = read_vocabulary(self.folder, self._vocab_size, self._feature_token_ids)
                info = xgrammar.TokenizerInfo(
                    tokens, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=sorted(self._end_token_ids)
                )
                compiler = xgrammar.GrammarCompiler(info, max_threads=NUM_WORKERS, cache_limit_bytes=CACHE_BYTES)
                self._made = compiler, Vocabulary(tokens, self._end_token_ids)
            return self._made


class Vocabulary:
    """The tokens' bytes, and which tokens may come where, as bits [W]."""

    def __init__(self, tokens: list[bytes], end_token_ids: frozenset[int]) -> None:
        self.tokens = tokens
        self.text = pack_bits([bool(token) or id in end_token_ids for id, token in enumerate(tokens)])
        control = bytes(byte for byte in range(32) if byte != ord("\n"))
        clean = [len(token.translate(None, control)) == len(token) for token in tokens]
        self.clean = self.text & pack_bits(clean)  # without control characters
        # xgrammar takes any byte after these, where UTF-8 does not (too long forms, surrogates, past the last character)
        second = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
        self.following = {
            lead: pack_bits([low <= token[0] <= high if token else False for token in tokens])
            for lead, (low, high) in second.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compiled:
    matcher: xgrammar.GrammarMatcher
    vocabulary: Vocabulary
    allowed: torch.Tensor  # [W] int32, tokens that such an answer may have at all


def read_vocabulary(folder: Path, vocab_size: int, feature_token_ids: frozenset[int]) -> list[bytes]:
    """The bytes of every token id, from the tokenizer's files; empty for special tokens and for ids without a token."""
    path = folder / "tokenizer.json"
    if path.exists():
        file = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)  # reads a large file in a tenth of json's time
    else:
        file = msgspec.convert(read_description(folder), _TokenizerFile)
    vocab = file.model.vocab
    pieces = dict(vocab.items()) if isinstance(vocab, dict) else {piece: id for id, (piece, *_) in enumerate(vocab)}
    kinds = _decoders(file.decoder)
    decode = bytes_of_token if "ByteLevel" in kinds else _from_metaspace
    tokens = [b""] * vocab_size
    for piece, id in pieces.items():
        if id < vocab_size:
            tokens[id] = decode(piece)
    settings_path = folder / "tokenizer_config.json"
    settings = msgspec.json.decode(settings_path.read_bytes(), type=dict[str, Any]) if settings_path.exists() else {}
    named = {str(value) for key, value in settings.items() if key.endswith("_token")}
    extra = settings.get("extra_special_tokens")
    named |= {str(value) for value in (extra.values() if isinstance(extra, dict) else extra or ())}
    for token in file.added_tokens:
        if token.id < vocab_size:
            special = token.special or token.id in feature_token_ids or token.content in named
            tokens[token.id] = b"" if special else token.content.encode()
    return tokens


def allowed_tokens(grammars: dict[int, Grammar], vocab_size: int, device: torch.device) -> dict[int, torch.Tensor | str]:
    """Per row: the tokens [V] bool that its grammar allows, or why there are none."""
    if not grammars:
        return {}
    bitmask = pinned((len(grammars), -(-vocab_size // 32)), torch.int32, device).fill_(-1)
    errors: dict[int, str] = {}
    for place, (row, grammar) in enumerate(grammars.items()):
        try:
            grammar.fill(bitmask, place)
        except RuntimeError as error:
            log.warning("a grammar failed: %s", error)
            errors[row] = f"the answer cannot go on: {str(error).splitlines()[0]}"
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    bits = (bitmask.to(device, non_blocking=True)[:, :, None] >> shifts & 1).flatten(1)[:, :vocab_size].bool()  # [R, V]
    return {row: errors.get(row, bits[place]) for place, row in enumerate(grammars)}


def pack_bits(flags: list[bool]) -> torch.Tensor:
    """[W] int32 whose bit t is flags[t]."""
    padded = torch.zeros(-(-len(flags) // 32) * 32, dtype=torch.int64)
    padded[: len(flags)] = torch.tensor(flags)
    return (padded.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(msgspec.Struct):
    """What is needed of tokenizer.json; the rest is passed over unread."""

    model: _Model
    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


def _decoders(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {str(decoder.get("type")), *(str(d.get("type")) for d in decoder.get("decoders", ()))}


def _from_metaspace(piece: str) -> bytes:
    """SentencePiece's: <0xNN> is a byte, and the sign U+2581 a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
