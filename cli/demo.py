"""`heft demo`: starts a service of its own, runs a fine-tuning job over HTTP, and queries the model.

It uses the command and the REST API as a user would.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli.client import Client, Json
from cli.errors import CommandError
from cli.options import Target
from cli.render import duration
from cli.stack.home import Home, make_private
from cli.stack.process import end, last_lines, spawn, wait_until
from cli.stack.supervise import Interrupted, interruptible
from cli.stack.up import RunningStack, running_stack
from cli.watch import watch_job
from heft_engine.data import samples

MODEL = "smollm2-135m"
SAMPLE = "passages"
#: Rows and settings of each stage, chosen to improve visibly in minutes on two cores.
ROWS = {"train": 600, "validation": 100, "test": 200}
LORA = {"n_epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
REFT = {"n_epochs": 2, "batch_size": 8}
QUESTIONS = 3
_START_SECONDS = 180
_STOP_SECONDS = 100


def run_demo(target: Target, port: int) -> None:
    """Runs the demo. Raises CommandError with the job's error message if it fails."""
    console = Console(highlight=False, soft_wrap=True)
    started_at = time.monotonic()
    home = Home.at(target.home.path / "demo")
    try:
        with interruptible():
            console.print(f"starting Postgres, Valkey, the API and the workers in {home.path} …")
            with (
                _own_stack(home, port) as stack,
                Client(stack.url, home.key_file.read_text().strip()) as client,
            ):
                console.print(f"{stack.url} is ready after {duration(time.monotonic() - started_at)}\n")
                _cancel_unfinished(client)
                request = _request(client, home, console)
                job = client.post("/v1/fine_tuning/jobs", request)
                console.print(f"job {job['id']}: HEFT on {MODEL}\n")
                job = watch_job(client, job["id"], console)
                if job["status"] != "succeeded":
                    error = job.get("error") or {}
                    raise CommandError(f"the job {job['status']}: {error.get('message', 'no error message')}")
                _show_results(client, job, console)
                _predict(client, job, console)
                _show_curl(stack, home, request, job, console)
    except Interrupted:
        raise CommandError("interrupted") from None
    console.print(f"\nthe demo took {duration(time.monotonic() - started_at)}")


@contextmanager
def _own_stack(home: Home, port: int) -> Iterator[RunningStack]:
    """Runs `heft up` in a home of its own, without the HEFT_ settings of this shell."""
    with home.own():  # raises AlreadyRunning
        home.state_file.unlink(missing_ok=True)
    make_private(home.logs)
    log = home.logs / "up.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEFT_")}
    process = spawn(
        [sys.executable, "-P", "-m", "cli", "--home", home.path, "up", "--port", str(port)],
        log=log,
        environment=environment,
        death_signal=signal.SIGTERM,
    )
    try:
        yield _wait_for(home, process, log)
    finally:
        end(process, [(signal.SIGTERM, _STOP_SECONDS)])


def _wait_for(home: Home, process: subprocess.Popen[bytes], log: Path) -> RunningStack:
    def answers() -> bool:
        if process.poll() is not None:
            raise CommandError(f"the service did not start:\n{last_lines(log)}")
        return running_stack(home) is not None

    wait_until(answers, seconds=_START_SECONDS)
    stack = running_stack(home)
    if stack is None:
        raise CommandError(f"the service did not answer in {_START_SECONDS} s; see {home.logs}")
    return stack


def _cancel_unfinished(client: Client) -> None:
    """Cancels the job of an interrupted demo, which would run first."""
    for job in client.get_all("/v1/fine_tuning/jobs"):
        if job["finished_at"] is None:
            client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")


def _request(client: Client, home: Home, console: Console) -> Json:
    files = {}
    for split, field in (("train", "training"), ("validation", "validation"), ("test", "test")):
        path = home.path / f"{SAMPLE}-{split}.jsonl"
        rows = samples.generate(SAMPLE, split, ROWS[split], 0)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[f"{field}_file"] = client.upload(path)["id"]
        console.print(f"uploaded {path.name}, {len(rows)} rows: {files[f'{field}_file']}")
    return {
        "model": MODEL,
        **files,
        "suffix": "demo",
        "seed": 0,
        "reuse": False,  # so that a second demo trains again
        "method": {"type": "heft", "heft": {"lora": LORA, "reft": REFT}},
    }


def _show_results(client: Client, job: Json, console: Console) -> None:
    evaluation = job["evaluation"]
    seconds: dict[str, float] = {}
    for event in client.get_all(f"/v1/fine_tuning/jobs/{job['id']}/events"):
        if event["data"].get("code") == "STAGE_COMPLETE":
            stage = event["data"]["stage"]
            seconds[stage] = seconds.get(stage, 0.0) + event["data"]["seconds"]
    names = {"base": f"base ({MODEL})", "lora": "after LoRA", "reft": "after ReFT"}
    table = Table(title=f"\n{evaluation['n']} held-out rows ({evaluation['split']})", title_justify="left")
    for column in ("", "accuracy", "95 % interval", "correct", "training time"):
        table.add_column(column)
    for result in evaluation["results"]:
        low, high = result["interval_95"]
        training_seconds = seconds.get(result["stage"])
        table.add_row(
            names.get(result["stage"], result["stage"]),
            f"{100 * result['accuracy']:.1f} %",
            f"{100 * low:.1f} … {100 * high:.1f} %",
            f"{result['correct']}",
            "" if training_seconds is None else duration(training_seconds),
        )
    console.print(table)


def _predict(client: Client, job: Json, console: Console) -> None:
    console.print("\nthree of the held-out questions, answered by /predict:\n")
    for row in samples.generate(SAMPLE, "test", QUESTIONS, 0):
        answer = client.post("/predict", _question(job, row))
        predicted = f"{answer['answer']} ({answer['probability']:.2f})"
        gold = "yes" if row["answer"] else "no"
        console.print(f"  {row['passage']}", markup=False)
        console.print(f"  {row['question']}?  → {predicted}; the right answer is {gold}\n", markup=False)


def _question(job: Json, row: Json) -> Json:
    return {"model": job["fine_tuned_model"], "question": row["question"], "passage": row["passage"]}


def _show_curl(stack: RunningStack, home: Home, request: Json, job: Json, console: Console) -> None:
    [row] = samples.generate(SAMPLE, "test", 1, 0)
    header = '-H "Authorization: Bearer $KEY"'
    as_json = f"{header} -H 'Content-Type: application/json'"
    port = stack.url.rpartition(":")[2]
    lines = [
        f"heft --home {shlex.quote(str(home.path))} up --port {port} &",
        f"KEY=$(cat {shlex.quote(str(home.key_file))})",
        f"curl {stack.url}/v1/files {header} -F purpose=fine-tune "
        f"-F file=@{shlex.quote(str(home.path / f'{SAMPLE}-train.jsonl'))}",
        f"curl {stack.url}/v1/fine_tuning/jobs {as_json} -d {shlex.quote(json.dumps(request))}",
        f"curl {stack.url}/v1/fine_tuning/jobs/{job['id']} {header}",
        f"curl {stack.url}/predict {as_json} -d {shlex.quote(json.dumps(_question(job, row)))}",
    ]
    console.print("the same with curl:\n")
    for line in lines:
        console.print(f"  {line}", markup=False)
