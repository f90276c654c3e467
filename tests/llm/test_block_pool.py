"""The pool's books agree whatever is done to it, and equal prefixes, and only those, are found again."""

from __future__ import annotations

import random

import pytest

from vlserve.llm.block_pool import BlockPool, block_digest


def test_released_blocks_keep_their_content_until_needed() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    digests = [bytes([i]) * 32 for i in range(3)]
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    assert pool.num_free == 4 and pool.match(digests) == blocks
    pool.share(blocks[:1])
    assert pool.num_free == 3
    pool.allocate(3)  # needs the other two as well
    assert pool.match(digests) == blocks[:1]
    pool.check()


def test_the_end_of_a_prefix_is_given_up_before_its_beginning() -> None:
    pool = BlockPool(3, 2)
    blocks = pool.allocate(3)
    digests = [bytes([i]) * 32 for i in range(3)]
    for block, digest in zip(blocks, digests, strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match(digests) == blocks[:2]


def test_a_block_without_known_content_is_taken_first() -> None:
    pool = BlockPool(2, 2)
    known, unknown = pool.allocate(2)
    pool.register(known, b"k" * 32)
    pool.release([known])
    pool.release([unknown])
    assert pool.allocate(1) == [unknown]


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 2, prefix_caching=False)
    (block,) = pool.allocate(1)
    pool.register(block, b"k" * 32)
    assert pool.match([b"k" * 32]) == []


def test_digests_tell_apart_everything_that_matters() -> None:
    base = block_digest(b"", [1, 2], [b"image"])
    others = [
        block_digest(b"", [1, 3], [b"image"]),
        block_digest(b"", [1, 2], [b"other"]),
        block_digest(b"", [1, 2]),
        block_digest(base, [1, 2], [b"image"]),
        block_digest(b"", [1, 2], [b"ima", b"ge"]),
    ]
    assert len({base, *others}) == 6 and base == block_digest(b"", (1, 2), [b"image"])


@pytest.mark.parametrize("seed", range(20))
def test_books_agree_after_anything(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12, 2)
    owners: list[list[int]] = []
    digests = [bytes([i]) * 32 for i in range(30)]
    for _ in range(300):
        action = rng.random()
        if action < 0.4 and pool.num_free:
            owned = pool.allocate(rng.randint(1, pool.num_free))
            for block in owned:
                if rng.random() < 0.7:
                    pool.register(block, rng.choice(digests))
            owners.append(owned)
        elif action < 0.6:
            found = pool.match([rng.choice(digests)])
            pool.share(found)
            owners.append(found)
        elif owners:
            pool.release(owners.pop(rng.randrange(len(owners))))
        pool.check()
    for owned in owners:
        pool.release(owned)
    assert pool.num_free == 12
