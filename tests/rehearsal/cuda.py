"""`torch.cuda` for a machine without one: the stand-ins that an engine needs, beside device.py's tensors."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from tests.rehearsal.device import Device, DeviceError, Graph, Memory, Shared
from vlserve.plan.tp_plan import DRIVER_BYTES, GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the product asks of a card; the names are torch's."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    L2_cache_size: int

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor


def _card(name: str, major: int, minor: int, gib: int, processors: int, shared: int, l2: int) -> Card:
    return Card(
        name=name,
        major=major,
        minor=minor,
        total_memory=gib * GIB,
        multi_processor_count=processors,
        shared_memory_per_block_optin=shared,
        L2_cache_size=l2,
    )


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and NVIDIA's data sheets
A100 = _card("NVIDIA A100-SXM4-80GB", 8, 0, 80, 108, 163 * 1024, 40 * 2**20)
H100 = _card("NVIDIA H100 80GB HBM3", 9, 0, 80, 132, 227 * 1024, 50 * 2**20)
B200 = _card("NVIDIA B200", 10, 0, 180, 148, 227 * 1024, 126 * 2**20)
# 24 GiB, of which the driver tells a little less; NVIDIA Ada GPU architecture (white paper): 128 processors, L2 of 72 MiB
RTX4090 = _card("NVIDIA GeForce RTX 4090", 8, 9, 24, 128, 99 * 1024, 72 * 2**20)
RTX5090 = _card("NVIDIA GeForce RTX 5090", 12, 0, 32, 170, 99 * 1024, 96 * 2**20)


@dataclass(frozen=True, slots=True)
class Stream:
    """The one of a device."""

    device_index: int


class Rehearsal:
    """Devices of one machine, all of one kind. `entered` is for each thread that computes on them."""

    def __init__(self, card: Card, count: int = 1) -> None:
        self.card, self.count, self.shared = card, count, Shared()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with Device(self.shared):
            yield
            self.shared.queue(self.shared.current).finish()

    def memory(self, device: Any = None) -> Memory:
        return self.shared.memory.setdefault(self.index(device), Memory())

    def index(self, device: Any = None) -> int:
        """Of a device as torch.cuda's functions take it; this thread's where none is named."""
        if isinstance(device, int):
            return device
        given = None if device is None else torch.device(device).index
        return self.shared.current if given is None else given


def _called_alike(real: Any, stand_in: Any) -> Any:
    """Refuses arguments that torch's own would not take."""
    if not inspect.isfunction(real):  # a class
        return stand_in
    signature = inspect.signature(real)

    @functools.wraps(real)
    def called(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return stand_in(*args, **kwargs)

    return called


def install(monkeypatch: pytest.MonkeyPatch, rehearsal: Rehearsal) -> None:
    """In place of torch's own; with the test they are gone."""
    shared, card = rehearsal.shared, rehearsal.card
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as FakeTensorMode does
    _device_constructors()  # which `with torch.device(...)` asks for once, by torch's own functions

    class Event:
        """It knows which transfers were asked for before it; all else is done at once."""

        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self.is_timing, self.is_recorded, self.index, self.up_to = enable_timing, False, -1, 0

        def record(self, stream: Any = None) -> None:
            index = rehearsal.index() if stream is None else stream.device_index
            if self.index not in (-1, index):
                raise DeviceError(f"an event of device {self.index} is recorded on device {index}")
            self.is_recorded, self.index, self.up_to = True, index, shared.queue(index).num_begun

        def query(self) -> bool:
            shared.queue(self.index).finish(self.up_to)
            return True

        def synchronize(self) -> None:
            shared.wait("Event.synchronize", self.up_to, self.index)

        def elapsed_time(self, other: Event) -> float:
            if not (self.is_timing and other.is_timing and self.is_recorded and other.is_recorded):
                raise DeviceError("elapsed_time of events that do not time, or were not recorded")
            if self.index != other.index:
                raise DeviceError(f"elapsed_time of events on devices {self.index} and {other.index}")
            return 0.01

    def synchronize(device: Any = None) -> None:
        shared.wait("torch.cuda.synchronize")

    def set_device(device: Any) -> None:
        index = rehearsal.index(device)
        if not 0 <= index < rehearsal.count:
            raise DeviceError(f"there is no device {index}")
        shared.current = index

    @contextlib.contextmanager
    def on_device(device: Any) -> Iterator[None]:
        before, shared.current = shared.current, rehearsal.index(device)
        try:
            yield
        finally:
            shared.current = before

    @contextlib.contextmanager
    def graph(made: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        shared.recording.graph, made.shared = made, shared
        memory = rehearsal.memory()
        before, peak, memory.peak = memory.now, memory.peak, memory.now
        try:
            yield
        finally:
            shared.recording.graph = None
            made.undo()
            if shared.is_meta:  # all graphs share one pool; of what they kept without one, `now` knows
                memory.pool, memory.peak = max(memory.pool, memory.peak - before), peak
            else:
                memory.peak = max(memory.peak, peak)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        memory = rehearsal.memory(device)
        return card.total_memory - memory.now - memory.pool - DRIVER_BYTES, card.total_memory

    def reset_peak(device: Any = None) -> None:
        memory = rehearsal.memory(device)
        memory.peak = memory.now

    tensor, empty = torch.tensor, torch.empty

    def pinning(make: Any) -> Any:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if make is tensor and device is not None and torch.device(device).type == "cuda":  # no operator, but for the copy
                return tensor(*args, **{key: value for key, value in kwargs.items() if key != "device"}).to(device)
            result: torch.Tensor = make(*args, **kwargs)
            return shared.pin(result) if pin_memory else result

        return made

    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: rehearsal.count,
        "current_device": lambda: shared.current,
        "set_device": set_device,
        "get_device_properties": lambda device=None: card,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "can_device_access_peer": lambda device, other: True,
        "current_stream": lambda device=None: Stream(rehearsal.index(device)),
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: 0,
        "device": on_device,
        "device_of": lambda x: on_device(x.device) if x.is_cuda else contextlib.nullcontext(),
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: rehearsal.memory(device).now,
        "max_memory_allocated": lambda device=None: rehearsal.memory(device).peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats_as_nested_dict": lambda device=None: {
            "allocated_bytes": {"all": {"current": rehearsal.memory(device).now}}
        },
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, _called_alike(getattr(torch.cuda, name), stand_in))
    monkeypatch.setattr(torch, "tensor", pinning(tensor))
    monkeypatch.setattr(torch, "empty", pinning(empty))
