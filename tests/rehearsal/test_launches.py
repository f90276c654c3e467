"""Launches are judged by what Triton makes of them: the signature, what a kernel assumes of its tensors, and what is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.signatures import Signature, compiled, gathered, signature_of
from tests.rehearsal import compile as compiling
from tests.rehearsal.device import DeviceError
from tests.rehearsal.full_size import (
    INTERNVL3_1B,
    INTERNVL3_5_8B,
    INTERNVL3_8B,
    INTERNVL3_38B,
    INTERNVL3_78B,
    Model,
    attend,
    decode,
    encode,
    sample,
    there,
)
from tests.rehearsal.judged import wanted_of
from tests.rehearsal.launches import Launches
from vlserve.kernels.attention import triton as attention_triton
from vlserve.kernels.group_sums import triton as sums_triton
from vlserve.kernels.norms import rms_norm
from vlserve.kernels.norms import triton as norms_triton

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "model", [INTERNVL3_1B, INTERNVL3_38B, INTERNVL3_78B, INTERNVL3_5_8B], ids=("1B", "38B", "78B", "3.5-8B")
)
def test_models_of_full_size(model: Model, launches: Launches) -> None:
    launches.runs = False
    encode(model, BF16)
    decode(model, BF16, 16384, None)
    attend(model, BF16, None)
    sample(model, BF16)
    assert len({signature.kernel for signature in launches.signatures}) >= 9


def test_codes_of_full_size(launches: Launches) -> None:
    """Keys and values in eight bits, and weights in four."""
    launches.runs = False
    model = INTERNVL3_8B
    for kind in (None, torch.int8, torch.uint8):
        attend(model, BF16, kind)
    attend(model, BF16, None, window=4096)
    for rows in (1, 17, 33, 128, 16384):
        for dtype in (BF16, FP16):
            decode(model, dtype, rows, 128)
    assert len({signature for signature in launches.signatures if signature.kernel == "_matmul"}) >= 6


@pytest.mark.parametrize("offset,stride", [(0, 1), (1, 48), (8, 2**40), (4, 7)])
def test_signatures_are_tritons(offset: int, stride: int) -> None:
    """Of tensors in memory its binder says the same, and what it says is what is known of them."""
    x = torch.zeros(512, dtype=BF16)[offset:]
    assert (x.data_ptr() - 2 * offset) % 64 == 0
    args = (x, x, x, x, x, None, stride, 48, 1e-6)
    constants: dict[str, Any] = {"WIDTH": 48, "WIDTH_PADDED": 64, "ADDS": True, "GROUPS": 0}
    kernel = norms_triton._rms_kernel
    signature, given = signature_of(kernel, args, constants | {"num_warps": 2, "maxnreg": None})
    known, bind, _ = compiled(kernel)
    _, native, _ = bind(*args, **constants)
    assert [kind for _, kind in signature.types] == [kind for kind, _ in native]
    assert signature.aligned == tuple(
        name for name, (kind, what) in zip(known.arg_names, native, strict=True) if kind != "constexpr" and "D" in (what or "")
    )
    assert ("x" in signature.aligned) == (2 * offset % 16 == 0) and "residual_stride" in signature.aligned
    assert dict(signature.types)["x_stride"] == {1: "constexpr", 2**40: "i64"}.get(stride, "i32")
    assert dict(signature.constants)["sums"] is None and signature.options == (("num_warps", 2),)
    assert given["x_stride"] == stride and "num_warps" not in given


def test_what_triton_shall_not_specialise_is_no_part_of_a_signature() -> None:
    x, sums = torch.zeros(1, 128, dtype=FP16), torch.zeros(1, 2, 1)
    found = {signature_of(sums_triton._kernel, (x, sums, n, n), {"GROUPS": 1, "BLOCKS": 16})[0] for n in (1, 16, 17)}
    assert len(found) == 1


def norm(x: torch.Tensor, *, weight: torch.Tensor | None = None, x_stride: int | None = None, rows: int = 1) -> None:
    """A launch as the product's, but for what is asked."""
    weight, stride = there(BF16, 64) if weight is None else weight, x.stride(0) if x_stride is None else x_stride
    out = there(BF16, *x.shape)
    norms_triton._rms_kernel[(rows,)](
        out, out, x, x, weight, None, stride, stride, 1e-6, WIDTH=64, WIDTH_PADDED=64, ADDS=False, GROUPS=0
    )


def test_launches_that_would_read_something_else_are_refused(launches: Launches) -> None:
    launches.runs = False
    x = there(BF16, 4, 128)[:, :64]
    norm(x)
    with pytest.raises(DeviceError, match=r"'x' lies \(128, 1\) for \(4, 64\), but the kernel is told \(64,\)"):
        norm(x, x_stride=64)
    with pytest.raises(DeviceError, match=r"'x' lies \(1, 4\)"):
        norm(there(BF16, 64, 4).t())
    with pytest.raises(DeviceError, match="'weight' lies .* takes no strides"):
        norm(x, weight=there(BF16, 128)[::2])
    with pytest.raises(DeviceError, match="a tensor of the host as 'weight'"):
        norm(x, weight=torch.zeros(64, dtype=BF16))
    with pytest.raises(DeviceError, match="a grid of"):
        norm(x, rows=2**31)
    with pytest.raises(DeviceError, match="'weight' spans 4294967296 numbers"):
        norm(x, weight=there(BF16, 2**32))


def test_what_is_kept_is_what_triton_makes(launches: Launches) -> None:
    """With another version than that of the file, that a sample compiles."""
    launches.runs = False
    rms_norm(there(BF16, 4, 64), there(BF16, 64), 1e-6)
    found = compiling.compile_anew(wanted_of(launches))
    assert {one.architecture for one in found} == set(compiling.SHARED) - {89} and not [
        fault for one in found for fault in one.faults()
    ]
    if compiling.written_with() == compiling.TRITON:
        kept = compiling.read()
        assert [kept.get(one.key, one) for one in found] == found, "that all are kept is asked of each test when it has ended"


def test_a_key_is_of_all_that_is_compiled() -> None:
    names = gathered(norms_triton._rms_kernel)
    assert {"vlserve.kernels.norms.triton._rms_kernel", "vlserve.kernels.group_sums.triton.store_sums"} <= names.keys()
    assert any(name.endswith(" COLUMNS") for name in gathered(attention_triton._attention_kernel))
    one = Signature(norms_triton.__name__, "_rms_kernel", (("x", "*bf16"),), (), ("x",), ())
    other = Signature(norms_triton.__name__, "_rms_kernel", (("x", "*bf16"),), (), (), ())
    assert len({compiling.key_of(signature, arch) for signature in (one, other) for arch in (80, 90)}) == 4


def test_faults_of_what_was_compiled_are_told() -> None:
    found = compiling.Found("", "norms.triton._rms_kernel", 120, "norms.triton._rms_kernel()", 32, 1, 0, 100 * 1024, 128)
    spills, shared = found.faults()
    assert "1 instructions, 0 of them in loops" in spills and "102400 bytes of shared memory, and there are 101376" in shared


def test_the_document_has_the_table() -> None:
    assert compiling.table(compiling.read().values()) in compiling.DOCUMENT.read_text(), "python -m tests.rehearsal.compile"
