"""One part of the check: its function, its limit, and what it found."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from heft_engine.gpu_check.shapes import LLAMA_2_7B, SMALL, Shape, fitting, random_model
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import free_bytes

#: Lines of a traceback in a result.
_TRACEBACK = 12


@dataclass(kw_only=True)
class Target:
    """The device to check. small: every part takes small sizes, so that the check itself can be tried on a CPU."""

    device: torch.device
    small: bool = False

    @cached_property
    def shape(self) -> Shape:
        """The large model's shape: Llama-2-7B's, with fewer layers on a GPU that is too small for it."""
        return SMALL if self.small else fitting(LLAMA_2_7B, free_bytes(self.device))

    @cached_property
    def lm(self) -> PackedLM:
        """The large model in bfloat16, made once. Parts leave it as they found it."""
        return random_model(self.shape.config(), self.device, torch.bfloat16)

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Returns the shortest of some runs of `call`, after one that is not counted, until the device has ended it."""
        call()
        times: list[float] = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)


@dataclass(kw_only=True)
class Findings:
    """Figures and failed checks of a part. They are kept when the part fails later on."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, passed: bool, failure: str) -> None:
        """Records a check's failure; the part goes on."""
        if not passed:
            self.failures.append(failure)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the check. seconds: it is ended after so many."""

    name: str
    title: str
    seconds: float
    run: Callable[[Target, Findings], None]

    def result(self, target: Target) -> dict[str, Any]:
        """Runs the part and returns its result as JSON. An exception becomes a result; the next part can run."""
        findings, start = Findings(), time.monotonic()
        error: str | None = None
        try:
            self.run(target, findings)
        except Exception as raised:  # noqa: BLE001  whatever a part raises, the report says so and the others run
            lines = "".join(traceback.format_exception(raised)).strip().splitlines()
            error = "\n".join(lines[-_TRACEBACK:])
        status = "error" if error is not None else "failed" if findings.failures else "passed"
        result = {
            "part": self.name,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "figures": findings.figures,
            "failures": findings.failures,
        }
        return result if error is None else {**result, "error": error}
