"""`torch.cuda` for a machine without one: the stand-ins that an engine needs, beside device.py's tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors

from tests.rehearsal.device import Device, DeviceError, Graph, Memory, Shared

GIB = 2**30


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
RTX5090 = _card("NVIDIA GeForce RTX 5090", 12, 0, 32, 170, 99 * 1024, 96 * 2**20)


class Rehearsal:
    """Devices of one machine. `entered` is for each thread that computes on them."""

    def __init__(self, card: Card, count: int = 1) -> None:
        self.card, self.count, self.shared = card, count, Shared()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with Device(self.shared):
            yield

    def memory(self, device: Any = None) -> Memory:
        index = 0 if device is None else torch.device(device).index or 0
        return self.shared.memory.setdefault(index, Memory())


def install(monkeypatch: pytest.MonkeyPatch, rehearsal: Rehearsal) -> None:
    """In place of torch's own; with the test they are gone."""
    shared, card = rehearsal.shared, rehearsal.card
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as FakeTensorMode does
    _device_constructors()  # which `with torch.device(...)` asks for once, by torch's own functions

    class Event:
        """The device is through with everything at once, so it only knows whether it was recorded."""

        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self.is_timing, self.is_recorded = enable_timing, False

        def record(self, stream: Any = None) -> None:
            self.is_recorded = True

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            shared.wait("Event.synchronize")

        def elapsed_time(self, other: Event) -> float:
            if not (self.is_timing and other.is_timing and self.is_recorded and other.is_recorded):
                raise DeviceError("elapsed_time of events that do not time, or were not recorded")
            return 0.01

    def synchronize(device: Any = None) -> None:
        shared.wait("torch.cuda.synchronize")

    @contextlib.contextmanager
    def graph(made: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        shared.recording.graph = made
        try:
            yield
        finally:
            shared.recording.graph = None
            made.undo()

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return card.total_memory - rehearsal.memory(device).now - 500 * 2**20, card.total_memory

    def reset_peak(device: Any = None) -> None:
        memory = rehearsal.memory(device)
        memory.peak = memory.now

    tensor, empty = torch.tensor, torch.empty

    def pinning(make: Any) -> Any:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = make(*args, **kwargs)
            return shared.pin(result) if pin_memory else result

        return made

    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: rehearsal.count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: card,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "can_device_access_peer": lambda device, other: True,
        "current_stream": lambda device=None: None,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "device_of": lambda x: contextlib.nullcontext(),
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda device=None: rehearsal.memory(device).now,
        "max_memory_allocated": lambda device=None: rehearsal.memory(device).peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats_as_nested_dict": lambda device=None: {
            "allocated_bytes": {"all": {"current": rehearsal.memory(device).now}}
        },
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "tensor", pinning(tensor))
    monkeypatch.setattr(torch, "empty", pinning(empty))
