"""`train` in several processes: a killed one, a stop, a failure, and the death of the process that started them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_command import Command, command, write_rows
from engine_processes.pipes import DEADLINE, start, until
from engine_processes.ranks import Hostile
from engine_runs import LORA, but, config, yes_no
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from heft_engine.config.run_file import SECRET
from heft_engine.errors import ConfigError, EngineError, FailedElsewhere, RankLost
from heft_engine.runtime.distributed import Ranks
from heft_engine.runtime.sealed_directory import verify

__all__ = ["command", "start"]


@pytest.fixture
def run_file(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A run file of 3,000 steps in two processes, with a checkpoint after each."""
    content = {
        "config": config(tiny_llama_dir, "lora", [but(LORA, n_epochs=1_000)]).model_dump(mode="json"),
        "train": str(write_rows(tmp_path / "train.jsonl", yes_no(24))),
        "out": str(tmp_path / "out"),
        "checkpoint_dir": str(tmp_path / "checkpoints"),
        "checkpoint_seconds": 0,
        "allow_paths": True,
        "device": "cpu",
        "processes": 2,
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


def train(run_file: Path) -> list[str]:
    return [sys.executable, "-m", "heft_engine", "train", "--run-file", str(run_file)]


def ranks_of(process: Any, n: int = 2) -> list[psutil.Process]:
    """Waits for the ranks of a process; rank 0 is the first."""
    deadline = time.monotonic() + DEADLINE
    while len(ranks := psutil.Process(process.pid).children()) < n:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE)
    assert not alive


def finish(process: Any) -> tuple[list[dict[str, Any]], str]:
    """Returns the rest of a process's events, and its stderr."""
    out, err = process.communicate(timeout=DEADLINE)
    return [json.loads(line) for line in out.splitlines()], err


def test_a_killed_rank_ends_the_run_which_goes_on_from_its_last_checkpoint(
    run_file: Path, tmp_path: Path, start: Any
) -> None:
    process = start(*train(run_file))
    events = until(process.stdout, "CHECKPOINT_SAVED")
    ranks = ranks_of(process)
    sockets = [connection for rank in ranks for connection in rank.net_connections("inet")]
    assert {connection.laddr.ip.removeprefix("::ffff:") for connection in sockets} == {"127.0.0.1"}
    secrets = {rank.environ()[SECRET] for rank in ranks}
    assert len(secrets) == 1
    assert all(len(secret) == 64 and secret not in rank.cmdline() for rank in ranks for secret in secrets)
    ranks[1].kill()
    rest, rest_err = finish(process)
    events += rest
    assert_gone(ranks)
    assert process.returncode == 76, rest_err
    failures = [event for event in events if event["code"] == "FAILED"]
    assert [failure["data"]["error"]["code"] for failure in failures] == ["rank_lost"]
    assert "Process 1 of the 2" in failures[0]["message"]
    assert "SIGKILL" in failures[0]["message"]

    checkpoint = [event["data"] for event in events if event["code"] == "CHECKPOINT_SAVED"][-1]
    verify(Path(checkpoint["path"]))
    steps = [event["data"]["step"] for event in events if event["code"] == "METRICS"]
    assert steps[-1] - checkpoint["step"] <= 1
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "resume": checkpoint["path"]}))
    process = start(*train(run_file))
    assert until(process.stdout, "METRICS")[-1]["data"]["step"] == checkpoint["step"] + 1

    ranks = ranks_of(process)
    process.send_signal(signal.SIGUSR1)
    until(process.stdout, "METRICS")
    process.send_signal(signal.SIGTERM)
    events, err = finish(process)
    assert_gone(ranks)
    assert process.returncode == 75
    assert events[-1]["code"] == "CHECKPOINT_SAVED"
    assert err.count("most recent call first") >= 2, "both ranks show their stacks"


def test_two_machines_train_one_run_and_admit_no_stranger(
    run_file: Path, tmp_path: Path, start: Any, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    content = {**json.loads(run_file.read_text()), "processes": 1, "nodes": 2}
    files = []
    for rank in range(2):
        files.append(tmp_path / f"machine-{rank}.json")
        place = {"node_rank": rank, "rendezvous": f"127.0.0.1:{port}"}
        files[rank].write_text(json.dumps({**content, **place}))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv(SECRET, "k" * 64)
    first = start(*train(files[0]))
    (rank,) = ranks_of(first, 1)

    hostile = pickle.dumps(Hostile(tmp_path / "was unpickled"))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(hostile)
    with monkeypatch.context() as context:
        variables = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), SECRET: "o" * 64}
        for name, value in (variables | address).items():
            context.setenv(name, value)
        code, events, _ = command("train", "--run-file", files[1])
    assert code == 1
    assert [event["data"]["error"]["code"] for event in events] == ["wrong_secret"]
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    for name in ("failure", "failures", "default_pg/0//0//0"):
        store.set(name, hostile.hex())

    second = start(*train(files[1]))
    until(first.stdout, "METRICS")
    assert "k" * 64 not in " ".join(rank.cmdline())
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        events, err = finish(process)
        assert process.returncode == 75, err
    assert not (tmp_path / "was unpickled").exists()


def test_a_port_that_is_taken_is_named(
    command: Command, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "k" * 64)
    with socket.create_server(("", 0)) as server:
        rendezvous = f"127.0.0.1:{server.getsockname()[1]}"
        content = {**json.loads(run_file.read_text()), "nodes": 2, "rendezvous": rendezvous}
        run_file.write_text(json.dumps(content))
        code, events, _ = command("train", "--run-file", run_file)
    assert code == 1
    assert events[-1]["data"]["error"]["param"] == "rendezvous"
    assert "can't be listened on" in events[-1]["message"]


def test_ranks_end_with_the_process_that_started_them(run_file: Path, tmp_path: Path, start: Any) -> None:
    process = start(*train(run_file))
    ranks = ranks_of(process)
    assert {os.getpgid(rank.pid) for rank in ranks} == {os.getpgid(process.pid)}
    process.kill()
    assert_gone(ranks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "is_first", "reported"),
    [
        (ConfigError("no", param="device"), True, ["FAILED"]),
        (ConfigError("no", param="device"), False, []),
        (RankLost("rank 1"), True, []),  # the process that started the ranks knows more
        (FailedElsewhere("no", code="model_not_found"), False, ["FAILED"]),
    ],
)
def test_one_rank_reports_a_failure(
    run_file: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    is_first: bool,
    reported: list[str],
) -> None:
    class FailingRanks(Ranks):
        def on_device(self, requested: str | None) -> Ranks:
            raise error

        def is_first_failure(self, error: EngineError) -> bool:
            return is_first

        def failure_elsewhere(self) -> FailedElsewhere | None:
            return None

    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = FailingRanks(rank=1, size=2)
    monkeypatch.setattr("heft_engine.commands.train_process.process_group", lambda: nullcontext(ranks))
    code, events, _ = command("train", "--run-file", run_file)
    assert code == (76 if isinstance(error, RankLost) else 1)
    assert [event["code"] for event in events] == reported


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (["--nodes", "2"], "rendezvous"),
        (["--nodes", "2", "--rendezvous", "host"], "rendezvous"),
        (["--nodes", "2", "--node-rank", "2", "--rendezvous", "host:29500"], "node_rank"),
        (["--nodes", "2", "--rendezvous", "host:29500"], "rendezvous"),
    ],
)
def test_machines_that_can_not_meet_are_refused(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama_dir: Path,
    tmp_path: Path,
    arguments: list[str],
    param: str,
) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    rows = write_rows(tmp_path / "rows.jsonl", yes_no(4))
    paths = ("--model", tiny_llama_dir, "--train", rows, "--out", tmp_path / "out")
    code, events, _ = command("train", *paths, *arguments)
    assert code == 1
    assert events[-1]["code"] == "FAILED"
    assert events[-1]["data"]["error"]["param"] == param


@pytest.mark.parametrize(
    "argument", [("--gpus", "0"), ("--processes", "-1"), ("--nodes", "0"), ("--node-rank", "-1")]
)
def test_numbers_of_processes_and_machines_count_from_one(
    command: Command, argument: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command("train", *argument)
    assert caught.value.code == 2
    assert f"{argument[0]}: give a whole number from" in capfd.readouterr().err
