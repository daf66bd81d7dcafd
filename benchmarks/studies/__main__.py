"""Runs a study through `heft up`, on the first rows of two files, and writes STUDIES.md from all studies so far.

    python -m benchmarks.studies sst2-order --preset order --training sst2/train.jsonl --rows 2000 \
        --test sst2/dev.jsonl --seeds 1 2 3

Other settings are the preset's. A study of three seeds takes 15 minutes to an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.processor import processor
from benchmarks.serving.http import heft_up
from benchmarks.studies.report import write
from cli.client import Client, Json
from cli.report.data import Report
from cli.report.text import markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_POLL_SECONDS = 2.0
_ENDED = ("succeeded", "failed", "cancelled")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(arguments if arguments is not None else sys.argv[1:])
    options = parser().parse_args(arguments)
    RESULTS.mkdir(exist_ok=True)
    with (
        heft_up(options.model, HEFT_TRAINERS=str(options.trainers)) as stack,
        Client(stack.url, stack.key) as client,
    ):
        study = _run(client, options)
        jobs = [_job(client, job["id"]) for arm in study["arms"] for job in arm["jobs"]]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.studies", *arguments]),
        "processor": processor(),
        "seconds": study.pop("seconds"),
        "jobs": jobs,
        "study": study,
    }
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{options.name}.md").write_text(markdown(Report(study=study, curves={})))
    write(HERE.parent, RESULTS)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("name", help="name of the study and its result files")
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--training", type=Path, required=True)
    top.add_argument("--rows", type=int, help="number of training rows")
    top.add_argument("--test", type=Path, required=True)
    top.add_argument("--test-rows", type=int)
    top.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    top.add_argument("--preset")
    top.add_argument("--epochs-scale", type=float)
    top.add_argument("--trainers", type=int, default=1, help="concurrent jobs (heft up --trainers)")
    top.add_argument("--body", type=json.loads, default={}, help="other fields of the request, as JSON")
    return top


def _run(client: Client, options: argparse.Namespace) -> Json:
    body = {"name": options.name, "model": options.model, "seeds": options.seeds, **options.body}
    body |= {
        name: value
        for name, value in (("preset", options.preset), ("epochs_scale", options.epochs_scale))
        if value is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        for field, path, rows in (
            ("training_file", options.training, options.rows),
            ("test_file", options.test, options.test_rows),
        ):
            part = Path(folder) / f"{field}.jsonl"
            with path.open() as lines:
                part.write_text("".join(islice(lines, rows)))
            body[field] = client.upload(part)["id"]
    started_at = time.monotonic()
    study = client.post("/v1/studies", body)
    printed = ""
    while study["status"] not in _ENDED:
        time.sleep(_POLL_SECONDS)
        study = client.get_with_retries(f"/v1/studies/{study['id']}")
        statuses = [job["status"] for arm in study["arms"] for job in arm["jobs"]]
        progress = f"{sum(status in _ENDED for status in statuses)} of {len(statuses)} jobs have ended"
        if progress != printed:
            print(f"{time.monotonic() - started_at:6.0f} s: {progress}", file=sys.stderr, flush=True)
        printed = progress
    return study | {"seconds": time.monotonic() - started_at}


def _job(client: Client, job_id: str) -> dict[str, Any]:
    """Returns a job's status, evaluation and running time."""
    job = client.get(f"/v1/fine_tuning/jobs/{job_id}")
    has_run = job["started_at"] is not None and job["finished_at"] is not None
    return {
        "id": job_id,
        "status": job["status"],
        "seconds": job["finished_at"] - job["started_at"] if has_run else None,
        "error": job["error"],
        "evaluation": job["evaluation"],
    }


if __name__ == "__main__":
    main()
