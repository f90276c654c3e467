"""Launches are judged by what Triton makes of them: the signature, what a kernel assumes of its tensors, and what is compiled."""

from __future__ import annotations

import pytest
import torch

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
)
from tests.rehearsal.launches import Launches

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("model", [INTERNVL3_1B, INTERNVL3_38B, INTERNVL3_78B, INTERNVL3_5_8B], ids=("1B", "38B", "78B", "3.5-8B"))
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


