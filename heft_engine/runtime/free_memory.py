"""What a process holds, and what it may still take, on the machine or its GPU: also inside a container with a limit."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_GROUP = Path("/sys/fs/cgroup")
#: Words in the command of every process that trains.
_TRAINER = frozenset({"heft_engine", "train"})


def resident_bytes(device: torch.device) -> int:
    """What this process holds now, where it computes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """What this process may still take, where it computes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        limit = int((_GROUP / "memory.max").read_text())
        free = min(free, limit - int((_GROUP / "memory.current").read_text()))
    return free


def share(device: torch.device, sharers: int) -> int:
    """Of what is free, when so many runs train there, this one among them.

    An even part of what is free and what they hold together: who comes late finds less free, and need not share that
    once more. What others hold is nobody's share. On a GPU an even part of what is free.
    """
    free = free_bytes(device)
    if sharers == 1 or device.type == "cuda":
        return free // sharers
    even = (free + _trainers_bytes()) // sharers - resident_bytes(device)
    return max(free // sharers, min(free, even))


def _trainers_bytes() -> int:
    """What all runs that train on this machine hold, this process among them."""
    held = 0
    for process in psutil.process_iter(["pid", "cmdline", "memory_info"]):
        trains = set(process.info["cmdline"] or ()) >= _TRAINER
        if (trains or process.info["pid"] == os.getpid()) and process.info["memory_info"] is not None:
            held += process.info["memory_info"].rss
    return held
