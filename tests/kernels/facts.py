"""What of a launch decides which of a kernel's statements run, and in which shapes: what tests of a kernel must have covered.

Kept of a launch: the kernel, the type of each pointer, that one is not there, flags, and the sizes of blocks. A model's own sizes
are reduced to what the kernel makes of them: whether a dimension fills the block that it is padded to (but not how long that
block is, since no statement asks for it: a longer one only has more columns, each computed alike), how a page lies to a tile,
whether there is one token a block or more. Left out: the bias of experts, which is added to all sums alike when they are
complete; warps and stages, which the interpreter does not know, alignment, and whole numbers that are arguments.
"""

from __future__ import annotations

from typing import Any

from tests.kernels.signatures import Signature

LEFT_OUT = {
    *("STAGES", "DIM_PADDED", "HEADS_PADDED", "KV_HEADS_PADDED", "WIDTH_PADDED", "HALF_PADDED", "KV_HEADS", "PARTS"),
    *("BINS", "CHOICES"),  # experts to sort by, and to add up: one more is done as the others are
}
ONE_OR_MORE = {"TOKENS", "SPLITS"}


def facts(signature: Signature) -> str:
    constants = dict(signature.constants)
    room = signature.module.removeprefix("vlserve.kernels.")
    parts = []
    for name, kind in signature.types:
        if name == "bias" and room.startswith("experts"):
            continue
        if kind.startswith("*") or constants.get(name, 0) is None:
            parts.append(f"{name}: {kind if kind.startswith('*') else None}")
        elif name.isupper() and (value := _reduced(room, name, constants)) is not None:
            parts.append(f"{name}={value}")
    return f"{room}.{signature.kernel}({', '.join(parts)})"


def _reduced(room: str, name: str, constants: dict[str, Any]) -> str | None:
    value = constants[name]
    if name + "_PADDED" in constants:
        return "full" if value == constants[name + "_PADDED"] else "part"
    if name in LEFT_OUT or (name == "TILE" and "PAGE" not in constants):  # by which attention's parts only count
        return None
    if name in ONE_OR_MORE:
        return "1" if value == 1 else "more"
    if name == "WINDOW":
        return "some" if value else "none"
    if name == "PAGE":
        tile = constants["TILE"]
        return "whole tiles" if value % tile == 0 else "a part of a tile" if tile % value == 0 else "across tiles"
    if name == "WIDTH":  # of the gate, in blocks
        return "whole blocks" if value % constants["BLOCK"] == 0 else "with a rest"
    if name == "GROUP":  # ROWS and TOKENS, or ONE_GROUP and BLOCK_K, say what the others make of it
        if room == "experts.triton":
            return "a row" if value == 0 else "within a turn" if value < constants["BLOCK_K"] else "whole turns"
        return str(min(value, 128)) if room in ("int4_pairs.triton", "experts.triton_pairs") else None
    return repr(value)
