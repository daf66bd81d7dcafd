"""The child process: its environment, its output, and the end of its process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from worker_bench import FAKE_ENGINE, eventually, gone

from worker.engine_process.child import Child, child_environment


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Starts a child that runs a piece of Python, and ends it with the test."""
    children: list[Child] = []

    def start(code: str) -> Child:
        source = "import json, os, signal, subprocess, sys, time\n" + textwrap.dedent(code)
        child = Child([sys.executable, "-c", source], env=child_environment(os.environ), cwd=tmp_path)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_only_listed_variables_are_inherited() -> None:
    environment = {
        "PATH": "/bin",
        "HF_HOME": "/hub",
        "CUDA_VISIBLE_DEVICES": "1",
        "NCCL_SOCKET_IFNAME": "eth0",
        "TRITON_CACHE_DIR": "/cache",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "2",
        "HEFT_BATCH_INVARIANT": "1",
        "HEFT_KERNELS": "off",
        "https_proxy": "http://proxy",
        "HEFT_DATABASE_URL": "postgresql://secret",
        "HEFT_API_KEY": "heft_a_b",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    inherited = child_environment(environment)
    assert {name for name in environment if name in inherited} == {
        *("PATH", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HEFT_KERNELS", "https_proxy"),
        *("HEFT_BATCH_INVARIANT", "NCCL_SOCKET_IFNAME", "TRITON_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG"),
    }


def test_json_lines_are_read_in_order_and_other_output_is_skipped(start: Callable[[str], Child]) -> None:
    child = start(
        """
        print('{"n": 1}'); print("Loading weights: 100%"); print("[1]"); print('{"n": 2}', flush=True)
        sys.stdout.write('{"n": 3}')
        """
    )
    assert list(child.lines()) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert child.wait() == 0


def test_exit_code_and_signal_are_returned(start: Callable[[str], Child]) -> None:
    assert start("sys.exit(75)").wait() == 75
    assert start("os.kill(os.getpid(), signal.SIGKILL)").wait() == -signal.SIGKILL


def test_its_children_end_with_it(start: Callable[[str], Child]) -> None:
    child = start(
        """
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print(json.dumps({"pid": helper.pid}), flush=True)
        """
    )
    (line,) = child.lines()  # ends although the helper holds the same stdout
    child.wait()
    eventually(lambda: gone(line["pid"]))


def test_kill_ends_the_whole_group(start: Callable[[str], Child]) -> None:
    child = start(
        """
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print(json.dumps({"pid": helper.pid}), flush=True)
        time.sleep(1000)
        """
    )
    line = next(child.lines())
    child.kill()
    assert child.wait() == -signal.SIGKILL
    eventually(lambda: gone(line["pid"]))
    child.kill()  # it has ended: no other process with its pid is killed


def test_it_ends_when_its_worker_is_killed(tmp_path: Path) -> None:
    """After SIGKILL of the parent, end-of-file on stdin and the parent-death signal reach the trainer."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"do": "silent"}\n')
    run = {"train": str(rows), "out": str(tmp_path), "checkpoint_dir": str(tmp_path), "resume": None}
    (tmp_path / "run.json").write_text(json.dumps(run))
    parent_code = f"""
        import os
        from pathlib import Path
        from worker.engine_process.child import Child
        command = [*{FAKE_ENGINE!r}, "--run-file", "run.json"]
        child = Child(command, env=dict(os.environ), cwd=Path({str(tmp_path)!r}))
        next(child.lines())
        print(child.pid, flush=True)
        child.wait()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(parent_code)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        trainer = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    trainer.wait(timeout=10)
