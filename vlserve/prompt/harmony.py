"""Harmony, the format in which GPT-OSS takes and gives messages: a header, and behind it a text for one of several channels.

`<|start|>assistant<|channel|>final<|message|>...<|return|>`. Source: cookbook.openai.com/articles/openai-harmony.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlserve.prompt.tokenizer import Tokenizer

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|endoftext|>")  # of a message
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
MARK = re.compile("|".join(map(re.escape, MARKS)))
_OPENING = (CHANNEL, "final", MESSAGE)


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    return all(mark in tokenizer.added for mark in (START, CHANNEL, MESSAGE))


def opened(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """What a prompt has behind its last `<|start|>`, for an answer to go on from; None where the model does not speak Harmony,
    or the prompt does not."""
    if not speaks_harmony(tokenizer):
        return None
    start = tokenizer.added[START]["id"]
    place = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] == start), None)
    return None if place is None else tokenizer.decode(ids[place + 1 :], skip_special_tokens=False)


def is_in_text(opened: str) -> bool:
    """Whether what follows belongs to a message's text, not to a header."""
    marks = [match[0] for match in MARK.finditer(opened) if match[0] != CONSTRAIN]
    return marks[-1:] == [MESSAGE]


def final_opening(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """What opens the final channel at once, behind a prompt that opens the assistant's turn; nothing elsewhere."""
    if opened(ids, tokenizer) != "assistant":
        return []
    return [
        id
        for text in _OPENING
        for id in ([tokenizer.added[text]["id"]] if text in tokenizer.added else tokenizer.encode_plain(text))
    ]
