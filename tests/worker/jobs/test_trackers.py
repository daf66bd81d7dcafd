"""Trackers get a job's metrics, and one that fails or hangs costs the job nothing. Real ones run as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from worker_bench import Bench, eventually, gone

from store.db.session import transaction
from store.db.states import JobState
from store.db.tables import Event
from store.errors import LostFence
from store.jobs import leases
from worker.context import TRACKER, Context
from worker.engine_process.child import child_environment
from worker.jobs import trackers
from worker.jobs.tracker_process import open_tracker

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
raise SystemExit("no answer from http://admin:secret@mlflow.internal")
"""
#: Neither it nor its child, which has the same process group, reads a record.
HANGS = """
import os, signal
if child := os.fork():
    print(os.getpid(), child, file=open("new", "w"), flush=True)
    os.rename("new", "pids")
signal.pause()
"""
#: Ends at once; its child stays.
LEAVES = """
import os, signal
if child := os.fork():
    print(os.getpid(), child, file=open("new", "w"), flush=True)
    os.rename("new", "pids")
    raise SystemExit
signal.pause()
"""


def tracked(bench: Bench, folder: Path, script: str, enabled: str = "wandb") -> Context:
    """A context in which every tracker is this script, in this folder."""
    context = bench.with_settings(tracking_dir=folder, integrations=enabled)
    return replace(context, tracker_command=(sys.executable, "-c", script))


def warning_of(bench: Bench, job_id: str) -> Event:
    """The only warning of a job."""
    (warning,) = [event for event in bench.events(job_id) if event.data["code"] == "WARNING"]
    return warning


def written(file: Path) -> str:
    """The content of a file that a tracker writes."""
    eventually(file.exists)
    return file.read_text()


class ClaimedAttempt:
    """A claimed attempt without an engine, whose lease is lost at the first write."""

    def __init__(self, bench: Bench, context: Context, *kinds: str) -> None:
        job_id = bench.queued([], integrations=[{"type": kind, kind: {"project": "boolq"}} for kind in kinds])
        with transaction(context.sessions) as session:
            claim = leases.claim(session, job_id=job_id, worker_id="worker-1", purpose="train")
        assert claim is not None
        self.context, self.claim = context, claim

    def write(self, _: Any) -> None:
        raise LostFence("the lease has expired")


def trackers_of(attempt: ClaimedAttempt) -> AbstractContextManager[trackers.Trackers]:
    """The trackers of such an attempt."""
    return trackers.trackers_of(cast(Any, attempt))


def test_a_tracker_gets_the_run_and_all_of_its_metrics(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.queued(STEPS, integrations=[WANDB])
    job = bench.run(job_id, tracked(bench, tmp_path, RECORDS))
    assert job.state == JobState.SUCCEEDED
    file = tmp_path / "records.jsonl"
    eventually(lambda: written(file).endswith("end"))
    run, *records = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
    assert {"kind": "wandb", "project": "boolq", "tags": ["a b"], "job_id": job_id}.items() <= run.items()
    assert run["config"]["model"] == "tiny"
    assert [record["step"] for record in records] == [0, 1, 2, 4]
    assert records[0]["values"] == {"evaluation/base": 0.5}
    assert records[1]["values"] == {"train_loss": 1.0, "learning_rate": 0.001}
    assert "WARNING" not in bench.codes(job_id)


def test_a_tracker_that_fails_is_a_warning_without_its_own_words(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine goes on when the tracker has ended. Its last line may hold the operator's passwords."""
    acts = [*STEPS, {"do": "until_ended", "file": str(tmp_path / "pid")}]
    acts += [{"do": "metrics", "step": step} for step in (5, 6)]
    job_id = bench.queued(acts, integrations=[WANDB])
    assert bench.run(job_id, tracked(bench, tmp_path, FAILS)).state == JobState.SUCCEEDED
    warning = warning_of(bench, job_id)
    assert warning.message.endswith("its process ended with exit code 1; the worker's log says why.")
    assert (warning.data["signature"], warning.data["integration"]) == ("tracker_failed", "wandb")
    eventually(lambda: "the tracker wandb ended" in caplog.text)
    (record,) = [record for record in caplog.records if "the tracker wandb ended" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.endswith("no answer from http://admin:secret@mlflow.internal")


def test_a_tracker_that_can_not_start_is_a_warning(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = bench.queued(STEPS, integrations=[WANDB])
    context = replace(tracked(bench, tmp_path, ""), tracker_command=("/nowhere",))
    assert bench.run(job_id, context).state == JobState.SUCCEEDED
    warning = warning_of(bench, job_id)
    assert warning.data["integration"] == "wandb"
    assert "training goes on" in warning.message
    assert "/nowhere" not in warning.message
    assert "/nowhere" in caplog.text


def test_a_tracker_that_the_worker_does_not_enable_is_not_started(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.queued(STEPS, integrations=[WANDB])
    context = tracked(bench, tmp_path / "tracking", RECORDS, enabled="mlflow")
    assert bench.run(job_id, context).state == JobState.SUCCEEDED
    warning = warning_of(bench, job_id)
    assert (warning.data["signature"], warning.data["integration"]) == ("tracker_not_enabled", "wandb")
    assert "HEFT_INTEGRATIONS" in warning.message
    assert not (tmp_path / "tracking").exists()


def test_a_tracker_ends_when_the_next_one_can_not_be_started(bench: Bench, tmp_path: Path) -> None:
    """The lease is lost while the warning for the second one is written."""
    attempt = ClaimedAttempt(bench, tracked(bench, tmp_path, RECORDS), "wandb", "mlflow")
    with pytest.raises(LostFence), trackers_of(attempt):
        pass
    eventually(lambda: written(tmp_path / "records.jsonl").endswith("end"))


def test_a_tracker_that_takes_no_records_is_killed_after_its_job(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a pipe full of records, and more wait: the time begins when the job ends."""
    monkeypatch.setattr(trackers, "_FINISH_SECONDS", 0.01)
    attempt = ClaimedAttempt(bench, tracked(bench, tmp_path, HANGS), "wandb")
    with trackers_of(attempt) as running:
        for step in range(2_000):
            running.handle({"code": "METRICS", "data": {"step": step, "train_loss": 0.5}})
        pids = [int(pid) for pid in written(tmp_path / "pids").split()]
        assert not any(gone(pid) for pid in pids)
    eventually(lambda: all(gone(pid) for pid in pids))


def test_what_a_tracker_leaves_is_killed_and_a_reaped_process_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of a process that was reaped may be another one's."""
    monkeypatch.setattr(trackers, "_MAX_WAITING", 1)
    killed: list[int] = []

    def killpg(pid: int, number: int) -> None:
        killed.append(pid)
        send_signal(pid, number)

    send_signal = os.killpg
    monkeypatch.setattr(os, "killpg", killpg)
    tracker = trackers._Tracker("wandb", {}, (sys.executable, "-c", LEAVES), tmp_path)
    leader, child = (int(pid) for pid in written(tmp_path / "pids").split())
    eventually(lambda: tracker.exit_code() is not None and gone(child))
    assert tracker.exit_code() == 0
    tracker.send({})
    tracker.close()  # its queue is full
    assert killed == [leader]


def test_nobody_waits_for_a_tracker_that_hangs(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_MAX_WAITING", 2)  # more is dropped
    job_id = bench.queued(STEPS, integrations=[WANDB])
    assert bench.run(job_id, tracked(bench, tmp_path, HANGS)).state == JobState.SUCCEEDED


def run_of(kind: str, folder: Path, name: str | None = None) -> dict[str, Any]:
    """The description of a run that a tracker's process gets."""
    run = {"kind": kind, "job_id": "ftjob-abc", "owner": "team", "project": "boolq", "name": name}
    return run | {
        "entity": None,
        "tags": ["x", "heft.owner"],
        "folder": str(folder),
        "config": {"model": "tiny", "seed": 1},
    }


def run_process(kind: str, folder: Path, **environment: str) -> None:
    """Sends two steps of a run to the real process of a tracker."""
    run = run_of(kind, folder)
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


#: A stand-in for the package of mlflow: every call of its functions becomes a line.
STAND_IN = """
import json, types
def _call(name):
    def call(*args, **options):
        with open("calls.jsonl", "a") as out:
            out.write(json.dumps([name, args, options], default=str) + "\\n")
        return RETURNS
    return call
RETURNS = []
limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
utils = types.SimpleNamespace(validation=limits)
def __getattr__(name): return _call(name)
"""


def test_mlflow(tmp_path: Path) -> None:
    package = tmp_path / "packages"
    package.mkdir()
    (package / "mlflow.py").write_text(STAND_IN)
    path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', os.getcwd())}"
    run_process("mlflow", tmp_path, PYTHONPATH=path)
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    calls = {name: (args, options) for name, args, options in lines}  # the last of each function
    assert calls["create_experiment"][1]["name"] == "boolq"
    assert calls["start_run"][1]["run_name"] == "ftjob-abc"
    assert calls["start_run"][1]["tags"] == {
        "heft.job_id": "ftjob-abc",
        "heft.owner": "team",
        "tag.x": "true",
        "tag.heft.owner": "true",
    }
    assert calls["log_metrics"] == ([{"train_loss": 0.5, "valid_loss": 0.5}], {"step": 2})
    assert "end_run" in calls


@pytest.mark.parametrize(("name", "run_name"), [(None, "ftjob-abc"), ("try", "try-ftjob-abc")])
def test_jobs_share_no_run_whatever_their_names(tmp_path: Path, name: str | None, run_name: str) -> None:
    """Trackio and TensorBoard go on with the run of an equal name; wandb with that of an equal id."""
    trackio = open_tracker(run_of("trackio", tmp_path, name))
    assert isinstance(trackio, TrackioTracker)
    assert trackio.run_name == "team-boolq"
    assert trackio.init_kwargs == {"name": run_name, "resume": "allow"}
    tensorboard = open_tracker(run_of("tensorboard", tmp_path, name))
    assert isinstance(tensorboard, TensorBoardTracker)
    assert tensorboard.run_name == f"team/boolq/{run_name}"
    wandb = open_tracker(run_of("wandb", tmp_path, name))
    assert isinstance(wandb, WandBTracker)
    assert (wandb.init_kwargs["id"], wandb.init_kwargs["name"]) == ("ftjob-abc", name or "ftjob-abc")
