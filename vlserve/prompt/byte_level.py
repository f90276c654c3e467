"""Byte-level BPE's tokens (GPT-2, Qwen, Llama 3), whose characters stand for bytes."""

from __future__ import annotations


def bytes_of_token(token: str) -> bytes:
    """An added token may have other characters: then it stands for itself."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_of_character() -> dict[str, int]:
    """A byte's own character where that can be printed, else the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_character()
