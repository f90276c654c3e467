"""What top-k and top-p keep of rows of logits, on a GPU, without a sort: the least logit that stays, and its last equal.

All ids are read once, in groups of GROUP, by as many programs as there is work for; they note each group's largest logit. Then a
program a row looks for the bound by halving, in the order of float32's bits. The groups' largest alone give a lower bound first:
if a part of the logits is enough of them, so are all. Most groups lie below it as a whole, and only the others are read again.
What is done for a row depends on nothing but that row, and its sums are added up in the same order each time.
Letters: D rows to be cut, V vocabulary, G groups, P parts of TURN groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 8  # of a line of `settings`, see triton.py
GROUP = 32  # ids
TURN = 64  # groups that a program reads at once


@triton.jit
def _order(number):
    """float32 -> int64 with the same order."""
    number = tl.where(number == 0, 0.0, number)  # without -0
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(order):
    """The reverse of `_order`."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _read(numbers, groups, num_groups, size, start, GROUP: tl.constexpr, TURN: tl.constexpr, LISTED: tl.constexpr):
    """A turn's logits [TURN, GROUP] and their ids; -inf beyond the end. LISTED: `groups` names them, else they are 0, 1, .."""
    place = start + tl.arange(0, TURN)
    group = tl.load(groups + place, mask=place < num_groups, other=0) if LISTED else place
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None]
    return tl.load(numbers + ids, mask=(place < num_groups)[:, None] & (ids < size), other=float("-inf")), ids


@triton.jit
def _measure(
    numbers, groups, num_groups, size, bound, largest, inverse,
    GROUP: tl.constexpr, TURN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Of what is at least `bound`, above -inf: how many, their weights' sum, the least; and the largest of what is below."""
    count, mass = tl.zeros([TURN, GROUP], tl.int32), tl.zeros([TURN, GROUP], tl.float32)
    least, below = tl.full([TURN, GROUP], float("inf"), tl.float32), tl.full([TURN, GROUP], float("-inf"), tl.float32)
    for start in range(0, num_groups, TURN):
        given, _ = _read(numbers, groups, num_groups, size, start, GROUP, TURN, LISTED)
        above = given >= bound
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp((given - largest) * inverse), 0.0)
        least = tl.minimum(least, tl.where(above, given, float("inf")))
        below = tl.maximum(below, tl.where(given < bound, given, float("-inf")))
    return tl.sum(count), tl.sum(mass), tl.min(least), tl.max(below)


@triton.jit
def _search(
    numbers, groups, num_groups, size, low, largest, inverse, count_wanted, mass_wanted,
    GROUP: tl.constexpr, TURN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest number such that those from it on are count_wanted and weigh mass_wanted; `low` if there is none above it."""
    lower, upper = _order(low), _order(largest)
    while lower < upper:
        middle = (lower + upper + 1) >> 1
        count, mass, least, below = _measure(
            numbers, groups, num_groups, size, _number(middle), largest, inverse, GROUP, TURN, LISTED
        )
        if (count >= count_wanted) & (mass >= mass_wanted):
            lower = _order(least)
            upper = tl.where(count == count_wanted, lower, upper)
        else:
            upper = _order(below)
    return _number(lower)


@triton.jit
def _select(maxima, groups, num_groups, bound, GROUP: tl.constexpr, TURN: tl.constexpr):
    """Lists the groups whose largest number is at least `bound`, in their order -> how many."""
    found = 0
    for start in range(0, num_groups, TURN * GROUP):
        group = start + tl.arange(0, TURN * GROUP)
        there = group < num_groups
        chosen = (there & (tl.load(maxima + group, mask=there, other=0.0) >= bound)).to(tl.int32)
        tl.store(groups + found + tl.cumsum(chosen, 0) - chosen, group, mask=chosen == 1)
        found += tl.sum(chosen)
    return found


@triton.jit
def _find_equal(numbers, groups, num_groups, size, bound, wanted, GROUP: tl.constexpr, TURN: tl.constexpr):
    """The id of the wanted-th of those that are `bound`, counted from 1 on; `size` if there are fewer."""
    seen, last = 0, size
    for start in range(0, num_groups, TURN):
        given, ids = _read(numbers, groups, num_groups, size, start, GROUP, TURN, True)
        equal = tl.reshape((given == bound).to(tl.int32), [TURN * GROUP])
        is_last = (equal == 1) & (seen + tl.cumsum(equal, 0) == wanted)
        last = tl.minimum(last, tl.min(tl.where(is_last, tl.reshape(ids, [TURN * GROUP]), size)))
        seen += tl.sum(equal)
    return last


@triton.jit(do_not_specialize=["row_stride", "vocab", "num_groups"])
def _survey(
    logits, tokens, settings, maxima, sums, row_stride, vocab, num_groups,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Program (row, part): each group's largest logit, and the sum of the part's weights."""
    draw, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(settings + draw * COLUMNS).to(tl.int64)
    numbers = logits + row * row_stride
    largest = tl.load(numbers + tl.load(tokens + row))
    given, _ = _read(numbers, numbers, num_groups, vocab, part * TURN, GROUP, TURN, False)
    group = part * TURN + tl.arange(0, TURN)
    tl.store(maxima + draw * num_groups + group, tl.max(given, 1), mask=group < num_groups)
    weights = tl.exp((given - largest) * tl.load(settings + draw * COLUMNS + 1).to(tl.float32))
    tl.store(sums + draw * tl.num_programs(1) + part, tl.sum(weights))


@triton.jit(do_not_specialize=["row_stride", "vocab", "num_groups", "parts"])
def _cut(
    logits, tokens, settings, maxima, sums, groups, least, last, row_stride, vocab, num_groups, parts,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, TURN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program a row."""
    draw = tl.program_id(0).to(tl.int64)
    asked = settings + draw * COLUMNS
    row = tl.load(asked).to(tl.int64)
    inverse, top_p = tl.load(asked + 1).to(tl.float32), tl.load(asked + 3).to(tl.float32)  # of the temperature
    top_k = tl.load(asked + 2).to(tl.int32)
    numbers, maxima, groups = logits + row * row_stride, maxima + draw * num_groups, groups + draw * num_groups
    largest = tl.load(numbers + tl.load(tokens + row))
    part = tl.arange(0, PARTS)
    mass = tl.sum(tl.load(sums + draw * parts + part, mask=part < parts, other=0.0))
    of_groups, wanted = tl.cdiv(num_groups, GROUP), tl.where(top_k < vocab, -1.0, top_p * mass)
    count = tl.where(top_k < vocab, top_k, 1)
    none, all = float("-inf"), vocab
    low = _search(maxima, maxima, of_groups, num_groups, none, largest, inverse, count, wanted, GROUP, TURN, False)
    found = _select(maxima, groups, num_groups, low, GROUP, TURN)
    tl.debug_barrier()  # the list is read by other threads
    bound, equals = low, all
    if top_k < vocab:
        bound = _search(numbers, groups, found, vocab, low, largest, inverse, top_k, -1.0, GROUP, TURN, True)
        above, mass, _, _ = _measure(
            numbers, groups, found, vocab, _number(_order(bound) + 1), largest, inverse, GROUP, TURN, True
        )
        equals = top_k - above
        mass += equals * tl.exp((bound - largest) * inverse)
    if top_p < 1:
        wanted = top_p * mass
        nucleus = _search(numbers, groups, found, vocab, bound, largest, inverse, 1, wanted, GROUP, TURN, True)
        _, mass, _, _ = _measure(numbers, groups, found, vocab, _number(_order(nucleus) + 1), largest, inverse, GROUP, TURN, True)
        needed = tl.ceil((wanted - mass) / tl.exp((nucleus - largest) * inverse))
        enough = tl.where(needed < all, tl.maximum(needed, 1.0), all).to(tl.int32)  # weights of 0 are all needed
        equals = tl.where(nucleus > bound, enough, tl.minimum(enough, equals))
        bound = nucleus
    tl.store(least + draw, bound)
    tl.store(last + draw, _find_equal(numbers, groups, found, vocab, bound, equals, GROUP, TURN))


def top_filter(
    logits: torch.Tensor, tokens: torch.Tensor, settings: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first `number` draws of `settings` (D): the least logit that is kept [D], and the last id that is of its equals [D].

    Args:
        logits: [R, V] float32, rows may lie apart.
        tokens: [R] int64, of the largest of each row.
    """
    vocab, device = logits.shape[1], logits.device
    num_groups = triton.cdiv(vocab, GROUP)
    parts = triton.cdiv(num_groups, TURN)
    maxima = torch.empty((number, num_groups), dtype=torch.float32, device=device)
    groups = torch.empty((number, num_groups), dtype=torch.int32, device=device)
    sums = torch.empty((number, parts), dtype=torch.float32, device=device)
    least = torch.empty((number,), dtype=torch.float32, device=device)
    last = torch.empty((number,), dtype=torch.int32, device=device)
    if not number:
        return least, last
    sizes = {"COLUMNS": COLUMNS, "GROUP": GROUP, "TURN": TURN}
    _survey[(number, parts)](logits, tokens, settings, maxima, sums, logits.stride(0), vocab, num_groups, **sizes, num_warps=8)
    _cut[(number,)](
        *(logits, tokens, settings, maxima, sums, groups, least, last, logits.stride(0), vocab, num_groups, parts),
        **sizes,
        PARTS=triton.next_power_of_2(parts),
        num_warps=16,
    )
    return least, last
