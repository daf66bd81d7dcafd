"""The processor of a measurement, as results name it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Instructions for products of bfloat16 matrices, fastest first: the flag in /proc/cpuinfo, and its usual name.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-bf16", "avx512f": "AVX512", "avx2": "AVX2"}


def processor() -> str:
    """This machine's processor: its name, its fastest instructions for bfloat16, and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    instructions = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), "no AVX2")
    return f"{fields.get('model name', 'unnamed')}, {instructions}, {len(os.sched_getaffinity(0))} cores"


def measured_on(results: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Lines of a report that name the processor of every part, parts of one processor together."""
    parts: dict[str, list[str]] = {}
    for name, result in results:
        parts.setdefault(result["processor"], []).append(name)
    if len(parts) == 1:
        return [f"Measured on: {next(iter(parts))}."]
    return ["Measured on:", "", *(f"- {machine}: {', '.join(names)}." for machine, names in parts.items())]
