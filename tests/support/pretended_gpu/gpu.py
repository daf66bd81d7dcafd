"""The counters that a scenario gets, and the report that its test gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretended_gpu.memory import Memory
from pretended_gpu.watch import Watch


@dataclass(frozen=True)
class Gpu:
    """The counters of a scenario. `watch.clear()` and `memory.reset_peak()` begin a new count."""

    watch: Watch
    memory: Memory


@dataclass
class Report:
    """Counts of one scenario, by operation and place; peak_bytes by device. values: what the scenario returned.

    error: the traceback of a scenario that failed, else empty.
    """

    launches: dict[str, int] = field(default_factory=dict)
    synchronisations: dict[str, int] = field(default_factory=dict)
    mixed: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
