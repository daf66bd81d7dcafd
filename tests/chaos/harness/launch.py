"""Starts one process of the service with crash points in it: `launch.py <control folder> <role> [arguments]`.

Jobs whose rows ask for it are trained by `fake_trainer` instead of the engine; nothing else is changed.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[1]
FAKE_TRAINER_MARK = '{"fake_trainer"'


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
    if _is_for_fake_trainer(arguments):
        from harness import fake_trainer

        fake_trainer.main(arguments)
        return
    sys.argv = ["heft_engine", *arguments]
    runpy.run_module("heft_engine", run_name="__main__", alter_sys=True)


def _is_for_fake_trainer(arguments: list[str]) -> bool:
    if arguments[0] == "models":
        return True  # listing base models imports torch, which takes seconds at each start of a worker
    if arguments[0] not in ("train", "check"):
        return False
    order = json.loads(Path(arguments[arguments.index("--run-file") + 1]).read_text())
    rows = Path(order["train"] if arguments[0] == "train" else order["files"]["training_file"])
    with rows.open() as file:
        return file.read(len(FAKE_TRAINER_MARK)) == FAKE_TRAINER_MARK


if __name__ == "__main__":
    main()
