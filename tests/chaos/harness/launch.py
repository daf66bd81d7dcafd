"""Starts one process of the service with crash points in it: `launch.py <control folder> <role> [arguments]`.

It does NOT change what the process does otherwise, but for one thing: a job whose rows ask for it is trained by the
quick stand-in (`stand_in.py`) instead of the engine.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[1]
STAND_IN_MARK = '{"stand_in"'


def main() -> None:
    control, role, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    sys.path.append(str(CHAOS))
    from harness.crash_points import CrashPoints

    points = CrashPoints(control, role)
    if role == "engine":
        points.install(database=False)
        _engine(arguments)
    elif role == "api":
        points.install(database=True)
        sys.argv = ["heft", *arguments]
        runpy.run_module("cli", run_name="__main__", alter_sys=True)
    else:
        points.install(database=True)
        _worker(control, role)


def _worker(control: Path, role: str) -> None:
    from store.settings import settings
    from worker.__main__ import run
    from worker.celery_app import Role

    # `train-2` is a second training worker.
    engine = (sys.executable, "-P", str(Path(__file__).resolve()), str(control), "engine")
    run(Role(role.partition("-")[0]), settings(), engine_command=engine)


def _engine(arguments: list[str]) -> None:
    if _is_for_stand_in(arguments):
        from harness import stand_in

        stand_in.main(arguments)
        return
    sys.argv = ["heft_engine", *arguments]
    runpy.run_module("heft_engine", run_name="__main__", alter_sys=True)


def _is_for_stand_in(arguments: list[str]) -> bool:
    if arguments[0] == "models":
        return True  # looking for base models takes torch, and seconds of every start of a worker
    if arguments[0] not in ("train", "check"):
        return False
    order = json.loads(Path(arguments[arguments.index("--run-file") + 1]).read_text())
    rows = Path(order["train"] if arguments[0] == "train" else order["files"]["training_file"])
    with rows.open() as file:
        return file.read(len(STAND_IN_MARK)) == STAND_IN_MARK


if __name__ == "__main__":
    main()
