"""A fake `python -m heft_engine`: `train` runs the script in the training file.

Each line of that file is one action, {"do": …}:
  metrics step      a METRICS event            checkpoint step   a checkpoint and its event
  stage memory_bytes   a STAGE_STARTED event
  eval accuracy     an EVALUATION event        say text          a line that is not an event
  complain text     a line on stderr
  wait              until SIGTERM, then a checkpoint and exit 75
  stubborn          until SIGKILL: SIGTERM is ignored
  silent            until SIGKILL, saying nothing (SIGUSR1 writes the stacks)
  die code          exit with this code and no event (negative: by that signal); `once` skips it after a resume
  fail code message FAILED, exit 1; with node_rank, on that machine alone
  (checkpoint with spoil: "remove", "cut" or "change" it before its event; with key: the key of its stage's result;
   with metrics: {name: number} at its step)
  ask keys          STAGE_KEYS, and a STAGE_REUSED for each result that the worker provides
  told field=value  exit 3 unless the run file has this value
  leave right n costs   values of SUCCEEDED for comparisons: correct rows by seed (the first is seed 1)
  straggle path     start a process that never ends, and write its pid to `path`
A run that resumes skips every action up to the checkpoint's step. `check` runs those with "when": "checked"; one
of them, "refuse" with a field, makes its line a fault. `models` lists none.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

STOP = threading.Event()
STAGE = {"stage": "lora", "stage_index": 0}


def emit(code: str, **data: Any) -> None:
    kind = "metrics" if code == "METRICS" else "message"
    event = {"code": code, "type": kind, "level": "info", "message": code.lower(), "data": data, "time": 0.0}
    print(json.dumps(event), flush=True)


def write_directory(path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    manifest = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Play:
    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.checkpoints = Path(run["checkpoint_dir"])
        self.step = 0
        self.left: dict[str, Any] = {}
        if run["resume"]:
            self.step = json.loads((Path(run["resume"]) / "state.json").read_text())["step"]

    def act(self, act: dict[str, Any]) -> None:
        getattr(self, act["do"])(act)

    def metrics(self, act: dict[str, Any]) -> None:
        self.step = act["step"]
        emit("METRICS", **STAGE, step=self.step, total_steps=10, epoch=self.step / 5, loss=1 / self.step,
             train_loss=1 / self.step, learning_rate=0.001, tokens=8, seconds=0.1)  # fmt: skip

    def stage(self, act: dict[str, Any]) -> None:
        emit("STAGE_STARTED", **STAGE, memory_bytes=act["memory_bytes"])

    def checkpoint(self, act: dict[str, Any]) -> None:
        self.step = act.get("step", self.step)
        path = self.checkpoints / f"step-{self.step}-{os.getpid()}"
        files = {"state.json": json.dumps({"step": self.step})}
        if act.get("kind") in ("epoch", "stage"):
            files |= {"bundle/heft.json": json.dumps({"task": {"type": "yes_no"}})}
        write_directory(path, files)
        if act.get("spoil") == "remove":
            shutil.rmtree(path)
        elif act.get("spoil") == "cut":
            (path / "state.json").unlink()
        elif act.get("spoil") == "change":
            (path / "state.json").write_text("{}")
        kind = act.get("kind", "step")
        optional = {name: act[name] for name in ("key", "metrics") if name in act}
        stage = STAGE | {"stage_index": act.get("stage_index", 0)}
        emit("CHECKPOINT_SAVED", **stage, step=self.step, kind=kind, path=str(path), **optional)

    def ask(self, act: dict[str, Any]) -> None:
        folder = Path(self.run["stage_dir"])
        emit("STAGE_KEYS", keys=act["keys"])
        while not (folder / "answered").exists():
            threading.Event().wait(0.02)
        assert {path.name for path in folder.iterdir()} <= {"answered", *act["keys"]}
        for index, key in enumerate(key for key in act["keys"] if (folder / key).exists()):
            self.step = json.loads((folder / key / "state.json").read_text())["step"]
            emit(
                "STAGE_REUSED",
                stage="lora",
                stage_index=index,
                step=self.step,
                total_steps=10,
                epoch=1,
                key=key,
            )

    def eval(self, act: dict[str, Any]) -> None:
        emit("EVALUATION", stage="base", accuracy=act["accuracy"], correct=1, n=2, interval_95=[0, 1])

    def say(self, act: dict[str, Any]) -> None:
        print(act["text"], flush=True)

    def complain(self, act: dict[str, Any]) -> None:
        print(act["text"], file=sys.stderr, flush=True)

    def wait(self, _: dict[str, Any]) -> None:
        STOP.wait()
        self.checkpoint({})
        sys.exit(75)

    def until_ended(self, act: dict[str, Any]) -> None:
        """Waits until the process whose id is written into the file has ended and was reaped."""
        file = Path(act["file"])
        while not (file.exists() and (pid := file.read_text())):
            threading.Event().wait(0.02)
        while Path("/proc", pid).exists():
            threading.Event().wait(0.02)

    def stubborn(self, _: dict[str, Any]) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        emit("METRICS", **STAGE, step=self.step, total_steps=10, epoch=0.0, loss=1.0, learning_rate=0.1,
             tokens=1, seconds=0.1)  # fmt: skip
        threading.Event().wait()

    def silent(self, _: dict[str, Any]) -> None:
        threading.Event().wait()

    def die(self, act: dict[str, Any]) -> None:
        if not (act.get("once") and self.run["resume"]):
            if act["code"] < 0:
                os.kill(os.getpid(), -act["code"])
            os._exit(act["code"])

    def fail(self, act: dict[str, Any]) -> None:
        rank = self.run.get("node_rank")  # a check has none
        if act.get("node_rank", rank) != rank:
            return
        emit("FAILED", error={"code": act["code"], "message": act["message"], "param": None})
        sys.exit(1)

    def leave(self, act: dict[str, Any]) -> None:
        right = act["right"][(self.run["config"]["seed"] - 1) % len(act["right"])]
        outcomes = {"n": act["n"], "rows_sha256": "x", "results": [{**STAGE, "right": right}]}
        self.left = {"outcomes": outcomes, "costs": act.get("costs", [])}

    def told(self, act: dict[str, Any]) -> None:
        if any(self.run[name] != value for name, value in act.items() if name != "do"):
            os._exit(3)

    def straggle(self, act: dict[str, Any]) -> None:
        straggler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        Path(act["path"]).write_text(str(straggler.pid))


def export(arguments: list[str]) -> None:
    """Writes one file named after the format; fails for `pyreft`."""
    options = dict(itertools.pairwise(arguments))
    if options["--format"] == "pyreft":
        print(json.dumps({"error": {"code": "invalid_config", "message": "no intervention", "param": None}}))
        sys.exit(1)
    out = Path(options["--out"])
    out.mkdir()
    (out / "weights").write_text((Path(options["--bundle"]) / "heft.json").read_text() + options["--format"])


def diagnose(arguments: list[str]) -> None:
    """Writes a report with the number of rows, and a plot; fails for more than one row."""
    options = dict(itertools.pairwise(arguments))
    rows = Path(options["--data"]).read_text().splitlines()
    emit("WORKING")
    if len(rows) > 1:
        print(json.dumps({"error": {"code": "invalid_config", "message": "too many rows", "param": None}}))
        sys.exit(1)
    out = Path(options["--out"])
    out.mkdir()
    (out / "diagnostics.json").write_text(json.dumps({"object": "diagnostics", "rows": len(rows)}))
    (out / "weights.png").write_bytes(b"plot")


def check(order: dict[str, Any]) -> None:
    """Runs the actions with `"when": "checked"`."""
    play = Play({"checkpoint_dir": order["out"], "resume": None})
    faults, error = [], None
    for number, line in enumerate(Path(order["files"]["training_file"]).read_text().splitlines(), 1):
        act = json.loads(line)
        if act.get("when") == "checked" and act["do"] == "refuse":
            faults.append({"file": "training_file", "line": number, "field": act["field"], "reason": "bad"})
            error = {"code": "invalid_training_file", "message": f"line {number}", "param": "training_file"}
        elif act.get("when") == "checked":
            play.act(act)
    counts = {"rows": 1, "examples": 1, "truncated": 0, "longest": 4, "tokens": 4}
    report = {"files": {field: {"rows": 1} for field in order["files"]}, "faults": faults, "base_model": {}}
    if order["machine"] is not None:
        report["files"]["training_file"] = counts
    plan = None if order["machine"] is None else [{"type": "lora", "fits": True, "flops": 1}]
    emit("CHECKED", report=report, made={}, error=error, plan=plan)


def main() -> None:
    if "models" in sys.argv:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(9), daemon=True).start()
    faulthandler.register(signal.SIGUSR1)
    if sys.argv[1] == "export":
        export(sys.argv[2:])
        return
    if sys.argv[1] == "diagnose":
        diagnose(sys.argv[2:])
        return
    run = json.loads(Path(sys.argv[sys.argv.index("--run-file") + 1]).read_text())
    if sys.argv[1] == "check":
        check(run)
        return
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    play = Play(run)
    resumed_at = play.step
    emit("STARTED", method="lora", resolved={"learning_rate": 0.001, "device": "cpu"}, rows=1, total_steps=10)
    emit("STAGE_STARTED", **STAGE, total_steps=10, memory_bytes=1)
    for line in Path(run["train"]).read_text().splitlines():
        act = json.loads(line)
        if "when" not in act and act.get("step", resumed_at + 1) > resumed_at:
            play.act(act)
    write_directory(Path(run["out"]), {"heft.json": json.dumps({"task": {"type": "yes_no"}})})
    evaluation = {"n": 2, "metric": "accuracy", "split": "validation", "results": []}
    emit("SUCCEEDED", bundle=run["out"], evaluation=evaluation, parity={"lora": 0.0}, trained_tokens=80,
         **play.left)  # fmt: skip


main()
