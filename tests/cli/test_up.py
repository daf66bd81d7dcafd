"""`heft up` as a process: restarts of its children, and commands that use it. tests/e2e kills `heft up` itself."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from running_stack import HeftUp, heft, heft_up, start

from cli.stack.home import Home
from cli.stack.process import wait_until

GIVEN_KEY = "a long key of my own"


@pytest.fixture(scope="module")
def stack_up() -> Iterator[HeftUp]:
    """A stack that is shared by tests that do not change it."""
    folder = Path(tempfile.mkdtemp(prefix="heft-test-", dir="/tmp"))
    folder.chmod(0o711)
    home = Home.at(folder / "home")
    left = prefills(home) / "left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    try:
        with heft_up(home, HEFT_API_KEY=GIVEN_KEY, HEFT_TRAINERS="2") as stack:
            yield stack
    finally:
        shutil.rmtree(folder)


def prefills(home: Home) -> Path:
    return home.cache / "workers" / "shared" / "prefills"


def file_ids(stack: HeftUp) -> list[str]:
    answer = httpx.get(f"{stack.record.url}/v1/files", headers={"Authorization": f"Bearer {stack.key}"})
    return [file["id"] for file in answer.raise_for_status().json()["data"]]


def upload(stack: HeftUp, folder: Path) -> str:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"question": "is it so", "answer": True}) + "\n")
    result = stack.run("files", "upload", str(rows))
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_every_process_is_restarted(stack_up: HeftUp) -> None:
    for words in (["cli", "api"], ["worker", "prepare"], ["bin/postgres -D"], ["valkey-server"]):
        [child] = stack_up.named(*words)
        child.kill()

        def is_back(words: list[str] = words, dead: psutil.Process = child) -> bool:
            return any(process.pid != dead.pid for process in stack_up.named(*words)) and stack_up.is_ready()

        assert wait_until(is_back, seconds=60), words


def test_two_trainers_share_the_processors(stack_up: HeftUp) -> None:
    trainers = stack_up.named("worker", "train")
    assert len(trainers) == 2
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for trainer in trainers:
        environment = trainer.environ()
        assert (environment["OMP_NUM_THREADS"], environment["HEFT_TRAINERS"]) == (share, "2")
    [other] = stack_up.named("worker", "prepare")
    assert "OMP_NUM_THREADS" not in other.environ()
    assert {log.name for log in stack_up.home.logs.glob("worker-train*")} == {
        "worker-train.log",
        "worker-train-2.log",
    }


def test_trainers_evict_unused_activations(stack_up: HeftUp) -> None:
    assert wait_until(lambda: not (prefills(stack_up.home) / "left").exists(), seconds=60)


def test_one_stack_runs_in_a_home(stack_up: HeftUp) -> None:
    second = start(stack_up.home)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "already running" in errors
    assert stack_up.is_ready()


def test_files_command(stack_up: HeftUp, tmp_path: Path) -> None:
    uploaded = upload(stack_up, tmp_path)
    assert uploaded in stack_up.run("files", "list").stdout
    assert stack_up.run("files", "delete", uploaded).exit_code == 0
    assert uploaded not in stack_up.run("files", "list").stdout
    missing = stack_up.run("files", "delete", uploaded)
    assert missing.exit_code == 1
    assert missing.stderr.startswith("heft: ")
    assert stack_up.run("files", "upload", str(tmp_path / "absent")).exit_code == 1


def test_keys_command(stack_up: HeftUp) -> None:
    key = stack_up.run("keys", "create", "--owner", "ann", "--name", "laptop").stdout.strip()
    key_id = key.split("_")[1]
    assert stack_up.run("--api-key", key, "files", "list").exit_code == 0
    assert "ann" in stack_up.run("keys", "list").stdout
    assert stack_up.run("keys", "revoke", key_id).exit_code == 0
    refused = stack_up.run("--api-key", key, "files", "list")
    assert refused.exit_code == 1
    assert "key" in refused.stderr


def test_lists_and_errors(stack_up: HeftUp) -> None:
    for command in (["jobs", "list"], ["models", "list"], ["migrate"]):
        assert stack_up.run(*command).exit_code == 0
    for command in (["jobs", "get", "ftjob-none"], ["models", "delete", "ft:a/b:c"], ["jobs", "events", "x"]):
        result = stack_up.run(*command)
        assert result.exit_code == 1
        assert result.stderr.startswith("heft: ")


def test_a_key_from_the_environment_is_accepted_and_not_stored(stack_up: HeftUp) -> None:
    answer = httpx.get(f"{stack_up.record.url}/v1/models", headers={"Authorization": f"Bearer {GIVEN_KEY}"})
    assert answer.status_code == 200
    assert not stack_up.home.key_file.exists()
    assert all("HEFT_API_KEY" not in child.environ() for child in stack_up.named("-m"))


def test_a_port_in_use_is_named(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = heft("--home", str(home.path), "up", "--port", str(port))
    assert result.exit_code == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert "HEFT_PORT" in result.stderr
    assert not home.run.exists()


def test_keys_without_a_running_stack(home: Home) -> None:
    key = heft("--home", str(home.path), "keys", "create").stdout.strip()
    assert key.split("_")[1] in heft("--home", str(home.path), "keys", "list").stdout


@pytest.mark.parametrize("command", [["jobs", "list"], ["api"], ["worker", "train"]])
def test_commands_without_a_service_say_what_to_start(home: Home, command: list[str]) -> None:
    result = heft("--home", str(home.path), *command)
    assert result.exit_code == 1
    assert "heft up" in result.stderr


def test_a_model_folder_that_does_not_exist_is_named(home: Home) -> None:
    result = heft("--home", str(home.path), "up", "--model-dir", "/nowhere")
    assert result.exit_code == 1
    assert "/nowhere" in result.stderr


def test_a_key_that_could_be_guessed_is_refused_before_anything_starts(home: Home) -> None:
    result = heft("--home", str(home.path), "--api-key", "s3cret", "up")
    assert result.exit_code == 1
    assert "HEFT_API_KEY" in result.stderr
    assert "16 to 512 characters" in result.stderr
    assert not home.path.exists()


def test_the_doctor_reports_a_running_stack_as_ok(stack_up: HeftUp) -> None:
    def problems() -> list[tuple[str, str]]:
        checks = json.loads(stack_up.run("doctor", "--json").stdout)["checks"]
        return [(check["name"], check["found"]) for check in checks if check["state"] == "wrong"]

    assert wait_until(lambda: problems() == [], seconds=60), problems()
    assert stack_up.run("doctor").exit_code == 0


def test_the_doctor_reports_a_killed_stack(home: Home) -> None:
    assert heft("--home", str(home.path), "doctor").exit_code == 1
