"""The pretended machine, and `torch.cuda` as it answers there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import torch
from torch import Tensor

from pretended_gpu.memory import Memory


@dataclass(frozen=True)
class Machine:
    """A number of GPUs of so much memory (bytes) and of one compute capability: bfloat16 from (8, 0) on."""

    gpus: int = 1
    memory: int = 24 << 30
    capability: tuple[int, int] = (9, 0)


class _Stream:
    """A stream or an event: whatever is asked of it has happened already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        self.device = torch.device("cuda", 0)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def _nothing(self, *args: Any, **options: Any) -> None: ...

    record = wait = wait_event = wait_stream = synchronize = _nothing


def answer_for(machine: Machine, memory: Memory) -> None:
    """Makes `torch.cuda` answer for this machine, with the bytes of this ledger, until the process ends."""
    for name, answer in (_facts(machine) | _bytes(machine, memory)).items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]


def _facts(machine: Machine) -> dict[str, Callable[..., Any]]:
    current = [0]
    major, minor = machine.capability

    def properties(device: Any = None) -> Any:
        return SimpleNamespace(
            name="pretended GPU",
            total_memory=machine.memory,
            major=major,
            minor=minor,
            multi_processor_count=132,
            uuid=UUID(int=_index(device) + 1),
        )

    def random_state(device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def nothing(*args: Any, **options: Any) -> None: ...

    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.gpus,
        "current_device": lambda: current[0],
        "set_device": lambda device: current.__setitem__(0, _index(device)),
        "is_bf16_supported": lambda including_emulation=True: including_emulation or major >= 8,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
        "synchronize": nothing,
        "empty_cache": nothing,
        "get_rng_state": random_state,
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [random_state() for _ in range(machine.gpus)],
        "set_rng_state_all": nothing,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
    }


def _bytes(machine: Machine, memory: Memory) -> dict[str, Callable[..., Any]]:
    def key(device: Any) -> str:
        return f"cuda:{_index(device)}"

    def free_and_total(device: Any = None) -> tuple[int, int]:
        return memory.limit(key(device)) - memory.now[key(device)], machine.memory

    return {
        "mem_get_info": free_and_total,
        "memory_allocated": lambda device=None: memory.now[key(device)],
        "memory_reserved": lambda device=None: memory.now[key(device)],
        "max_memory_allocated": lambda device=None: memory.peak[key(device)],
        "max_memory_reserved": lambda device=None: memory.peak[key(device)],
        "reset_peak_memory_stats": lambda device=None: memory.reset_peak(key(device)),
    }


def _index(device: Any) -> int:
    """Returns the number of a device, given as torch takes it: None, a number, a name or a torch.device."""
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return torch.cuda.current_device() if index is None else index
