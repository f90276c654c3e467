"""A device that is not there, for the parts of benchmarks/gpu_contact.py: the rehearsal's of tests/, with what timing and two
ranks on one device need as well. For a process that does nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

PROCESSORS, TILES_AT_ONCE = 2, 2  # few, since every program is interpreted


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    """Threads that begin in it compute on the device too."""
    import pytest

    from tests.kernels.bfloat16 import compute_bfloat16
    from tests.rehearsal import cuda, interpreter
    from tests.rehearsal.launches import Launches
    from vlserve.engine import process_group
    from vlserve.kernels import measure
    from vlserve.vision import tower

    rehearsal = cuda.Rehearsal(replace(cuda.H100, multi_processor_count=PROCESSORS))
    with pytest.MonkeyPatch.context() as patch:
        cuda.install(patch, rehearsal)
        Launches(rehearsal.shared).install(patch)
        interpreter.install(patch)
        compute_bfloat16(patch)
        patch.setattr(torch, "tensor", _made_on_the_host(torch.tensor))
        patch.setattr(cuda.Stream, "wait_stream", lambda stream, other: None, raising=False)
        patch.setattr(torch.cuda, "Stream", lambda: cuda.Stream(0))
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(process_group.DistributedGroup, "__init__", _through_the_host(process_group.DistributedGroup.__init__))
        patch.setattr(measure, "FLUSHED", 1)
        patch.setattr(tower, "TILES_AT_ONCE", TILES_AT_ONCE)
        run = threading.Thread.run

        def entered(thread: threading.Thread) -> None:
            with rehearsal.entered():
                run(thread)

        patch.setattr(threading.Thread, "run", entered)
        with rehearsal.entered():
            yield


def _made_on_the_host(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor reaches for its device itself, without an operator that could be stood in for."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


def _through_the_host(init: Callable[..., None]) -> Callable[..., None]:
    """Gloo takes tensors of a device by way of the host's memory."""

    def initialised(group: Any, *args: Any, **kwargs: Any) -> None:
        init(group, *args, **kwargs)
        group._host = group._device = _Gloo(group._host)

    return initialised


class _Gloo:
    def __init__(self, gloo: Any) -> None:
        self._gloo = gloo

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._gloo, name)
        return lambda *args: call(*tree_map(_inner, args))


def _inner(one: Any) -> Any:
    from tests.rehearsal.device import DeviceTensor

    return one.inner if isinstance(one, DeviceTensor) else one
