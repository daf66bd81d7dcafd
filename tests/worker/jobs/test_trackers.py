"""Trackers get a job's metrics, and one that fails or hangs costs the job nothing. Real ones run as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worker_bench import Bench

from cli.stack.process import wait_until
from store.db.states import JobState
from worker.context import TRACKER, Context
from worker.engine_process.child import child_environment

STEPS = [{"do": "eval", "accuracy": 0.5}, *({"do": "metrics", "step": step} for step in (1, 2, 4))]
WANDB = {"type": "wandb", "wandb": {"project": "boolq", "tags": ["a b"]}}
#: Copies what it is sent into a file beside it.
RECORDS = """
import sys
with open("records.jsonl", "w") as out:
    for line in sys.stdin:
        out.write(line)
    out.write("end")
"""
FAILS = """
import os
print(os.getpid(), file=open("pid", "w"), end="", flush=True)
raise SystemExit("no API key is configured")
"""
HANGS = "import signal; signal.pause()"


def tracked(bench: Bench, folder: Path, script: str) -> Context:
    """A context in which every tracker is this script, in this folder."""
    context = bench.with_settings(tracking_dir=folder)
    return replace(context, tracker_command=(sys.executable, "-c", script))


def test_a_tracker_gets_the_run_and_all_of_its_metrics(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.queued(STEPS, integrations=[WANDB])
    job = bench.run(job_id, tracked(bench, tmp_path, RECORDS))
    assert job.state == JobState.SUCCEEDED
    file = tmp_path / "records.jsonl"
    assert wait_until(lambda: file.exists() and file.read_text().endswith("end"), seconds=10)
    run, *records = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
    assert {"kind": "wandb", "project": "boolq", "tags": ["a b"], "job_id": job_id}.items() <= run.items()
    assert run["config"]["model"] == "tiny"
    assert [record["step"] for record in records] == [0, 1, 2, 4]
    assert records[0]["values"] == {"evaluation/base": 0.5}
    assert records[1]["values"] == {"train_loss": 1.0, "learning_rate": 0.001}
    assert "WARNING" not in bench.codes(job_id)


def test_a_tracker_that_fails_is_a_warning(bench: Bench, tmp_path: Path) -> None:
    """The engine goes on when the tracker has ended."""
    acts = [*STEPS, {"do": "until_ended", "file": str(tmp_path / "pid")}]
    acts += [{"do": "metrics", "step": step} for step in (5, 6)]
    job_id = bench.queued(acts, integrations=[WANDB])
    assert bench.run(job_id, tracked(bench, tmp_path, FAILS)).state == JobState.SUCCEEDED
    (warning,) = [event for event in bench.events(job_id) if event.data["code"] == "WARNING"]
    assert warning.message.endswith("no API key is configured")
    assert warning.data["integration"] == "wandb"


def test_a_tracker_that_can_not_start_is_a_warning(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.queued(STEPS, integrations=[WANDB])
    context = replace(bench.with_settings(tracking_dir=tmp_path), tracker_command=("/nowhere",))
    assert bench.run(job_id, context).state == JobState.SUCCEEDED
    (warning,) = [event for event in bench.events(job_id) if event.data["code"] == "WARNING"]
    assert warning.data["integration"] == "wandb"
    assert "training goes on" in warning.message


def test_nobody_waits_for_a_tracker_that_hangs(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.trackers._MAX_WAITING", 2)  # more is dropped
    job_id = bench.queued(STEPS, integrations=[WANDB])
    assert bench.run(job_id, tracked(bench, tmp_path, HANGS)).state == JobState.SUCCEEDED


def run_process(kind: str, folder: Path, **environment: str) -> None:
    """Sends two steps of a run to the real process of a tracker."""
    run = {"kind": kind, "job_id": "ftjob-abc", "owner": "team", "project": "boolq", "name": None}
    run |= {"entity": None, "tags": ["x"], "folder": str(folder), "config": {"model": "tiny", "seed": 1}}
    records = [{"values": {"train_loss": 1 / step, "valid_loss": 0.5}, "step": step} for step in (1, 2)]
    lines = "".join(json.dumps(record) + "\n" for record in [run, *records])
    subprocess.run(
        TRACKER,
        input=lines.encode(),
        cwd=folder,
        env=child_environment(os.environ) | {"ACCELERATE_USE_CPU": "1"} | environment,
        check=True,
        timeout=120,
    )


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_process("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true", HOME=str(tmp_path))
    (run,) = (tmp_path / "wandb").glob("offline-run-*-ftjob-abc")
    content = (run / "run-ftjob-abc.wandb").read_bytes()
    assert b"train_loss" in content
    assert b"boolq" in content


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run_process("tensorboard", tmp_path)
    files = list((tmp_path / "team" / "boolq" / "ftjob-abc").glob("events.out.tfevents.*"))
    assert any(b"valid_loss" in file.read_bytes() for file in files)


#: A stand-in for the package of a tracker: every call of its functions becomes a line.
STAND_IN = """
import json, types
def _call(name):
    def call(*args, **options):
        with open("calls.jsonl", "a") as out:
            out.write(json.dumps([name, args, options], default=str) + "\\n")
        return RETURNS
    return call
class _Any:
    def __getattr__(self, name): return _call(name)
RETURNS = [] if __name__ == "mlflow" else _Any()
limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = types.SimpleNamespace(validation=limits)
config = _Any()
def __getattr__(name): return _call(name)
"""


def calls(kind: str, folder: Path) -> dict[str, Any]:
    """The last call of each function, of a tracker whose package is a stand-in."""
    package = folder / "packages"
    package.mkdir()
    (package / f"{kind}.py").write_text(STAND_IN)
    run_process(kind, folder, PYTHONPATH=f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', os.getcwd())}")
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return {name: (args, options) for name, args, options in lines}


def test_mlflow(tmp_path: Path) -> None:
    made = calls("mlflow", tmp_path)
    assert made["create_experiment"][1]["name"] == "boolq"
    assert made["start_run"][1]["run_name"] == "ftjob-abc"
    assert made["start_run"][1]["tags"] == {"heft.job_id": "ftjob-abc", "heft.owner": "team", "x": "true"}
    assert made["log_metrics"] == ([{"train_loss": 0.5, "valid_loss": 0.5}], {"step": 2})
    assert "end_run" in made


def test_trackio(tmp_path: Path) -> None:
    made = calls("trackio", tmp_path)
    assert made["init"][1] == {"project": "boolq", "name": "ftjob-abc", "resume": "allow"}
    assert made["log"][0] == [{"train_loss": 0.5, "valid_loss": 0.5}]
    assert "finish" in made
