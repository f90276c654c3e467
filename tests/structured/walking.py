"""Documents that a schema's grammar lets through, drawn byte by byte."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
import xgrammar

from vlserve.config import StructuredOutput
from vlserve.structured.grammar import to_grammar

# single bytes without control characters but the newline, as the engine has it for JSON; the last one ends
BYTES = [bytes([byte]) if byte == 10 or byte >= 32 else b"" for byte in range(256)]
SECOND = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}


def byte_compiler() -> xgrammar.GrammarCompiler:
    vocabulary = xgrammar.TokenizerInfo([*BYTES, b""], xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
    return xgrammar.GrammarCompiler(vocabulary, max_threads=1)


def matcher_of(compiler: xgrammar.GrammarCompiler, schema: Any) -> xgrammar.GrammarMatcher:
    """Raises RequestError for a schema that is refused."""
    return xgrammar.GrammarMatcher(compiler.compile_grammar(to_grammar(StructuredOutput(json=json.dumps(schema)))))


def wander(compiler: xgrammar.GrammarCompiler, schema: Any, rng: random.Random, most: int = 400) -> str | None:
    """As `walk`, for a schema."""
    return walk(matcher_of(compiler, schema), rng, most, str(schema))


def walk(matcher: xgrammar.GrammarMatcher, rng: random.Random, most: int, name: str) -> str | None:
    """A document that the grammar lets through; None when it has no end after `most` bytes."""
    matcher.reset()
    bitmask, out = torch.zeros(1, 9, dtype=torch.int32), bytearray()
    while len(out) < most:
        matcher.fill_next_token_bitmask(bitmask, 0)
        words = bitmask[0].tolist()
        allowed = [t for t in range(257) if words[t // 32] >> (t % 32) & 1 and (t == 256 or BYTES[t])]
        if out and out[-1] in SECOND:
            allowed = [t for t in allowed if t in SECOND[out[-1]]]
        assert allowed, f"{name}: no way on after {bytes(out)!r}"
        weights = [30 if t == 256 or t in (34, 93, 125) else 0.1 if t in (10, 32) else 1 if t < 128 else 0.05 for t in allowed]
        (token,) = rng.choices(allowed, weights)
        assert matcher.accept_token(token)
        if token == 256:
            return out.decode()
        out.append(token)
    return None
