"""One tracker of a job in a process of its own: `python -m worker.jobs.tracker_process`.

The first line of stdin describes the run, each further one has `values` and their `step`. The trackers are those of
accelerate.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

#: The longest call of a tracker; then SIGALRM ends the process.
_CALL_SECONDS = 120


def main() -> None:
    run = json.loads(sys.stdin.readline())
    PartialState(cpu=True)  # accelerate's logger needs it
    tracker = open_tracker(run)
    with _limited():
        tracker.start()
        tracker.store_init_configuration(run["config"])
    for line in sys.stdin:
        record = json.loads(line)
        with _limited():
            tracker.log(record["values"], step=record["step"])
    with _limited():
        tracker.finish()


@contextmanager
def _limited() -> Iterator[None]:
    signal.alarm(_CALL_SECONDS)
    yield
    signal.alarm(0)


def open_tracker(run: dict[str, Any]) -> GeneralTracker:
    """Returns the tracker of a run: {kind, job_id, owner, project, name, entity, tags, folder, config}.

    A resumed job goes on with its run where the tracker can do so. All owners' runs are in one account: no two jobs
    share a run, and a user's tag never takes the place of the operator's.
    """
    project, name = run["project"], run["name"] or run["job_id"]
    # Trackers that know a run by its name alone get one that no other job has.
    unique_name = f"{run['name']}-{run['job_id']}" if run["name"] else run["job_id"]
    match run["kind"]:
        case "wandb":
            same_run = {"id": run["job_id"], "resume": "allow"}
            options = {"entity": run["entity"], "tags": run["tags"], "dir": run["folder"]}
            return WandBTracker(project, name=name, **same_run, **options)
        case "mlflow":
            tags = {f"tag.{tag}": "true" for tag in run["tags"]}
            tags |= {"heft.job_id": run["job_id"], "heft.owner": run["owner"]}
            return MLflowTracker(project, run_name=name, tags=tags)
        case "trackio":
            return TrackioTracker(f"{run['owner']}-{project}", name=unique_name, resume="allow")
        case "tensorboard":
            return TensorBoardTracker(f"{run['owner']}/{project}/{unique_name}", logging_dir=run["folder"])
        case kind:
            raise ValueError(f"there is no tracker {kind!r}")


if __name__ == "__main__":
    main()
