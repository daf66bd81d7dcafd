"""Runs scenarios on a pretended machine in a child process, and returns what was counted."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pretended_gpu.gpu import Gpu, Report
from pretended_gpu.machine import Machine

_ROOT = Path(__file__).parents[3]
#: Takes the counters, and options that JSON can carry.
Scenario = Callable[..., "dict[str, Any] | None"]


def run(scenario: Scenario, machine: Machine | None = None, **options: Any) -> Report:
    """Returns the report of `scenario(gpu, **options)`, a function of a module's top level.

    Raises AssertionError with the traceback if the scenario fails.
    """
    (report,) = run_all([partial(scenario, **options)], machine)
    assert not report.error, f"the scenario failed on the pretended GPU:\n{report.error}"
    return report


def run_all(
    scenarios: Sequence[partial[dict[str, Any] | None]],
    machine: Machine | None = None,
    *,
    seconds: float = 200,
) -> list[Report]:
    """Returns the reports of several scenarios of one file, run one after another in one child process.

    A scenario that fails has its traceback in `Report.error`; the others run all the same.
    """
    (file,) = {inspect.getsourcefile(scenario.func) for scenario in scenarios}
    calls = [(scenario.func.__name__, scenario.keywords) for scenario in scenarios]
    paths = [str(_ROOT), str(_ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(paths),
        "HEFT_KERNELS": "off",
        "OMP_NUM_THREADS": "1",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # transformers' loading threads are outside the pretence
    }
    process = subprocess.run(
        [sys.executable, "-m", "pretended_gpu.child"],
        input=json.dumps([file, asdict(machine or Machine()), calls]),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env=os.environ | changes,
    )
    assert process.returncode == 0, f"the pretended GPU's process failed:\n{process.stderr[-6_000:]}"
    lines = process.stdout.splitlines()[-len(calls) :]
    return [Report(**json.loads(line)) for line in lines]


def main() -> None:
    """Runs the scenarios of stdin in this process, one line of JSON each.

    Ends without cleaning up: torch would ask the GPU that isn't there.
    """
    from pretended_gpu import build, torch_parts

    file, machine, calls = json.load(sys.stdin)
    build.load()
    torch_parts.replace()
    spec = importlib.util.spec_from_file_location("scenarios", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenarios"] = module
    spec.loader.exec_module(module)
    for name, options in calls:
        report = _count(getattr(module, name), Machine(**machine), options)
        print(json.dumps(asdict(report)), flush=True)
    os._exit(0)


def _count(scenario: Scenario, machine: Machine, options: dict[str, Any]) -> Report:
    """Returns what one scenario does, on a machine that is its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pretended_gpu.machine import answer_for
    from pretended_gpu.memory import Memory
    from pretended_gpu.watch import Watch

    memory, watch = Memory(machine.memory), Watch()
    answer_for(machine, memory)
    values, error = None, ""
    with FakeTensorMode(allow_non_fake_inputs=True), memory, watch:
        try:
            values = scenario(Gpu(watch, memory), **options)
        except Exception:  # noqa: BLE001  whatever it is, the test reports it
            error = traceback.format_exc()
    counts = (watch.launches, watch.synchronisations, watch.mixed, memory.peak)
    return Report(*map(dict, counts), values or {}, error)


if __name__ == "__main__":
    main()
