"""A device that is not there, for the parts of benchmarks/gpu_contact.py: the rehearsal's of tests/, with what timing needs as well.

For a process that does nothing else: threads that begin in it compute on the device too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass


def _made_on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor reaches for its device itself, without an operator that could be stood in for."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs).to(device or "cpu")

    return made


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    import pytest

    from tests.kernels.bfloat16 import compute_bfloat16
    from tests.rehearsal.cuda import H100, Rehearsal, install
    from tests.rehearsal.launches import Launches
    from vlserve.kernels import measure

    _device_constructors()  # kept from now on: `with torch.device(...)` knows torch's functions, not what stands in for them
    rehearsal = Rehearsal(H100)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, rehearsal)
        Launches(rehearsal.shared).install(patch)
        compute_bfloat16(patch)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
        patch.setattr(measure, "FLUSHED", 1)
        patch.setattr(torch, "tensor", _made_on_the_host(torch.tensor))
        run = threading.Thread.run

        def entered(thread: threading.Thread) -> None:
            with rehearsal.entered():
                run(thread)

        patch.setattr(threading.Thread, "run", entered)
        with rehearsal.entered():
            yield
