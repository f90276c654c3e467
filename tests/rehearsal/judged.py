"""What a test's engines launched, when it has ended: is every launch covered by a kernel's own tests, and does it compile?"""

from __future__ import annotations

from tests.kernels import covered
from tests.kernels.facts import facts
from tests.kernels.signatures import Signature
from tests.rehearsal import compile as compiling
from tests.rehearsal.launches import Launches
from tests.rehearsal.operations import CARDS

Wanted = set[tuple[Signature, int]]
_known: dict[str, compiling.Found] = {}  # what the file has, and what this session compiled
_compiled: list[compiling.Found] = []


def wanted_of(found: Launches) -> Wanted:
    """What was launched with the architecture of each card that launches it."""
    wanted: Wanted = {(signature, found.architecture) for signature in found.signatures}
    for card in CARDS:
        wanted |= {(signature, 10 * card.major + card.minor) for signature in found.operations.on(card)}
    return wanted


def judge(found: list[Launches]) -> None:
    """Raises AssertionError."""
    wanted = {one for launches in found for one in wanted_of(launches)}
    if not wanted:
        return
    known = set[str]().union(*covered.read().values())
    lacking = sorted({facts(signature) for signature, _ in wanted} - known)
    is_gathering = compiling.note(wanted)
    assert not lacking, "no test of tests/kernels launches these, so nothing says that they are right:\n" + "\n".join(lacking)
    if is_gathering or compiling.written_with() != compiling.TRITON:
        return
    if not _known:
        _known.update(compiling.read())
    missing = {key: one for one in wanted if (key := compiling.key_of(*one)) not in _known}
    left = compiling.MOST - len(_compiled)
    about = "\n".join(sorted(f"{signature} on sm_{arch}" for signature, arch in missing.values()))
    assert len(missing) <= left, f"python -m tests.rehearsal.compile has to compile {len(missing)} launches:\n{about}"
    if missing:
        _compiled.extend(new := compiling.compile_anew(missing.values()))
        _known.update((one.key, one) for one in new)
    faults = [fault for one in wanted for fault in _known[compiling.key_of(*one)].faults()]
    assert not faults, "\n".join(faults)
