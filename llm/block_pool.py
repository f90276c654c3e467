"""Who owns which block of the KV cache, and which full blocks can be shared as a cached prefix.

Pure Python: no tensors, no requests. A full block is known by a chained digest over everything before
it, so equal digests mean equal tokens and pictures from the first token on. A block that nobody uses
keeps its content, and its digest, until it is needed for something else (least recently used first).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Digest = bytes


def block_digest(previous: Digest, token_ids: Sequence[int], extra: Iterable[bytes] = ()) -> Digest:
    """32 bytes over the previous block's digest, this block's token ids and what else decides its content.

    `extra` holds, for each picture that reaches into the block, its digest and place.
    """
    digest = hashlib.blake2b(previous, digest_size=32)
    digest.update(array("q", token_ids).tobytes())
    for part in extra:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


class BlockPool:
    """Reference-counted blocks 0..num_blocks-1 of `block_size` slots."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._digests: list[Digest | None] = [None] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # oldest first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, digests: Iterable[Digest]) -> list[int]:
        """The blocks of the longest cached prefix, not yet taken."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_taken_by(self, blocks: Iterable[int]) -> int:
        """How many of these cached blocks are free now, so that taking them uses up free blocks."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take cached blocks for one more owner."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, number: int) -> list[int]:
        """Take `number` blocks with nothing in them; the caller has checked `num_free`."""
        assert number <= self.num_free, f"{number} blocks asked for, {self.num_free} free"
        taken = []
        for _ in range(number):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one owner's blocks; the last ones of a prefix are reused before the first ones."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: Digest) -> None:
        """Say what a full, owned block holds; the first of two equal blocks stays the known one."""
        if not self._prefix_caching or digest in self._by_digest:
            return
        assert self._references[block] > 0, f"block {block} is registered but not owned"
        self._digests[block] = digest
        self._by_digest[digest] = block

    def check(self) -> None:
        """Assert that the books agree; for tests and for idle moments."""
        for block, references in enumerate(self._references):
            assert (references == 0) == (block in self._free), f"block {block}: {references} owners, free list disagrees"
        for digest, block in self._by_digest.items():
            assert self._digests[block] == digest, f"block {block} is known by a digest that it does not have"

    def _forget(self, block: int) -> None:
        digest, self._digests[block] = self._digests[block], None
        if digest is not None:
            del self._by_digest[digest]
