"""`python -m heft_engine train` as a process: signals, and the death of its parent process."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_command import write_rows
from engine_processes.pipes import DEADLINE, start, until
from engine_runs import LORA, but, config, parse, run, yes_no

from heft_engine.runtime.sealed_directory import verify

__all__ = ["start"]


@pytest.fixture
def plan(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A run file of 120 steps: some seconds."""
    stage = but(LORA, n_epochs=40)
    content = {
        "config": config(tiny_llama_dir, "lora", [stage]).model_dump(mode="json"),
        "train": str(write_rows(tmp_path / "train.jsonl", yes_no(24))),
        "out": str(tmp_path / "out"),
        "checkpoint_dir": str(tmp_path / "checkpoints"),
        "allow_paths": True,
        "device": "cpu",
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


def engine(plan: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "heft_engine", "train", "--run-file", str(plan), *flags]


def test_sigterm_ends_a_run_with_a_checkpoint_that_it_goes_on_from(
    plan: Path, tmp_path: Path, tiny_llama_dir: Path, start: Any
) -> None:
    process = start(*engine(plan))
    before = until(process.stdout, "METRICS")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=DEADLINE)
    events = before + [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 75
    assert events[-1]["code"] == "CHECKPOINT_SAVED"
    assert not (tmp_path / "out").exists()
    checkpoint = Path(events[-1]["data"]["path"])
    verify(checkpoint)
    losses = {e["data"]["step"]: e["data"]["loss"] for e in events if e["code"] == "METRICS"}
    assert events[-1]["data"]["step"] == max(losses) < 120

    settings = config(tiny_llama_dir, "lora", [but(LORA, n_epochs=40)])
    rest = run(settings, tmp_path / "out", parse(yes_no(24)), resume=checkpoint)
    assert sorted([*losses, *rest.losses]) == list(range(1, 121))


def test_a_signal_for_stacks_shows_them_and_the_run_goes_on_until_its_pipe_closes(
    plan: Path, start: Any
) -> None:
    process = start(*engine(plan, "--die-with-parent"))
    until(process.stdout, "METRICS")
    process.send_signal(signal.SIGUSR1)
    until(process.stdout, "METRICS")
    process.stdin.close()
    process.stdin = None
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "heft_engine/training/loop.py" in err or "heft_engine/training/run.py" in err
    assert "most recent call first" in err


def test_a_starter_that_is_killed_takes_the_run_with_it(plan: Path, tmp_path: Path, start: Any) -> None:
    """Its pipe is kept open by a third process, so that only the kernel's signal can tell."""
    pid_file = tmp_path / "pid"
    starter = start(
        sys.executable,
        "-c",
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[2:], stdin=0)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "time.sleep(600)",
        pid_file,
        *engine(plan, "--die-with-parent"),
    )
    until(starter.stdout, "METRICS")
    child = psutil.Process(int(pid_file.read_text()))
    assert child.is_running()
    starter.kill()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the run outlived its parent process"
        time.sleep(0.02)
    assert not (tmp_path / "out").exists()
