"""What a process holds, and what it may still take, on the machine or its GPU: also inside a container with a limit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch


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
    limit = _limit()
    with suppress(OSError, ValueError):
        if limit is not None:
            free = min(free, limit - int((_GROUP / "memory.current").read_text()))
    return free


def share(device: torch.device, sharers: int) -> int:
    """Of what is free, when so many processes compute there, this one among them.

    An even part of all the memory, if so much is left of it: whoever comes late finds less free, and shall not have to
    share that once more.
    """
    free = free_bytes(device)
    if sharers == 1:
        return free
    even = _all_bytes(device) // sharers - resident_bytes(device)
    return max(free // sharers, min(free, even))


def _all_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total, limit = int(psutil.virtual_memory().total), _limit()
    return total if limit is None else min(total, limit)


_GROUP = Path("/sys/fs/cgroup")


def _limit() -> int | None:
    """Of this process's control group; None without one, or without a limit ("max")."""
    with suppress(OSError, ValueError):
        return int((_GROUP / "memory.max").read_text())
    return None
