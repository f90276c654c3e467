"""Noise that depends on a seed, on how many draws it has made, and on a token's id: the same on every device, in any company.

Philox-4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no state: a seed and a counter give four
words of 32 bits. The words of counter (c, number, 0, 0) belong to the ids 4c to 4c + 3.
"""

from __future__ import annotations

import torch

ROUNDS = 7  # the fewest that pass all tests of randomness in the paper
MULTIPLIERS, RAISED = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
WORD = 2**32 - 1
MOST = 1 - 2**-24  # the largest float32 below 1
SMALL = 2.0**-10
AT_ONCE = 2**13  # counters: as many words as torch computes with in one thread; others would be waited for after every operator


def philox(seed: int, number: int, counters: torch.Tensor) -> torch.Tensor:
    """counters [n] int64, below 2^32 -> [n, 4] int64, words of 32 bits; `seed` has 64 bits, `number` 32."""
    keys = [[(seed >> 32 * i) + r * raised & WORD for i, raised in enumerate(RAISED)] for r in range(ROUNDS)]
    even, odd = torch.stack((counters, torch.zeros_like(counters))), torch.zeros(2, 1, dtype=torch.int64, device=counters.device)
    odd[0] = number  # words 0 and 2, [2, n], and words 1 and 3
    for key in torch.tensor(keys, device=counters.device).unsqueeze(2):
        product = torch.empty_like(even)
        for i, multiplier in enumerate(MULTIPLIERS):
            torch.mul(even[i], multiplier, out=product[1 - i])  # wraps around, with the right bits
        even = (product >> 32).bitwise_and_(WORD).bitwise_xor_(odd).bitwise_xor_(key)
        odd = product.bitwise_and_(WORD)
    return torch.stack((even, odd), 2).permute(1, 0, 2).flatten(1)


def log_noise(words: torch.Tensor) -> torch.Tensor:
    """Words of 32 bits -> float32, logarithms of numbers with the exponential distribution."""
    share = ((words.float() + 0.5) * 2.0**-32).clamp_(max=MOST)
    # -log(1 - share), which is as good as float32 gets where a likely token wins: near 0
    return torch.where(share < SMALL, share + share.square() / 2, (1 - share).log_().neg_()).log_()


def log_noise_of(seed: int, number: int, ids: torch.Tensor, size: int) -> torch.Tensor:
    """ids [n] int64, below `size` -> [n] float32."""
    if 4 * len(ids) > size:  # each counter would be needed more than once
        return log_noise_of_all(seed, number, size, ids.device).gather(0, ids)
    return log_noise(philox(seed, number, ids >> 2).gather(1, (ids & 3).unsqueeze(1)).squeeze(1))


def log_noise_of_all(seed: int, number: int, size: int, device: torch.device) -> torch.Tensor:
    """Of the ids 0 to size - 1."""
    counters = torch.arange(-(-size // 4), device=device)
    parts = [log_noise(philox(seed, number, part).view(-1)) for part in counters.split(AT_ONCE)]
    return torch.cat(parts)[:size]
