"""A fake trainer: the engine's commands, events, checkpoints and exit codes, with hashes in place of a model.

Its weights are a chain of hashes that starts with the job's rows and seed, so the client can compute the right result
(`trained`) itself. A step that was skipped or done twice, or a checkpoint of another job or with a flipped bit, leads
to another result.

Its rows are one line, `{"fake_trainer": {"steps": 10, "step_seconds": 0.1, "salt": "…", "dies": false, "bad": false}}`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

STOPPED = 75
WEIGHTS = "weights.bin"
BAD = "invalid_training_file"
_PR_SET_PDEATHSIG = 1


def trained(salt: str, seed: int, steps: int) -> bytes:
    """Returns the weights after this number of steps, 4 KiB."""
    state = first(salt, seed)
    for step in range(1, steps + 1):
        state = after(state, step)
    return weights(state)


def first(salt: str, seed: int) -> str:
    return hashlib.sha256(f"{salt}/{seed}".encode()).hexdigest()


def after(state: str, step: int) -> str:
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def weights(state: str) -> bytes:
    return bytes.fromhex(state) * 128


def main(arguments: list[str]) -> None:
    if arguments[0] == "models":
        print(json.dumps({"id": "tiny", "source": "directory", "revision": None, "info": {}}), flush=True)
        return
    _die_with_parent()
    order = json.loads(Path(arguments[arguments.index("--run-file") + 1]).read_text())
    if arguments[0] == "check":
        _check(order)
    else:
        _Run(order).train()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    faulthandler.register(signal.SIGUSR1)


def _check(order: dict[str, Any]) -> None:
    report = {"files": {field: {"rows": 1} for field in order["files"]}, "faults": [], "base_model": {}}
    rows = json.loads(Path(order["files"]["training_file"]).read_text())["fake_trainer"]
    error = {"code": BAD, "message": "The rows ask to be refused.", "param": "training_file"}
    _emit("CHECKED", report=report, made={}, error=error if rows["bad"] else None)


class _Run:
    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        rows = json.loads(Path(order["train"]).read_text())["fake_trainer"]
        self.steps, self.seconds, self.salt = rows["steps"], rows["step_seconds"], rows["salt"]
        self.dies = rows["dies"]
        self.step, self.state = 0, first(self.salt, order["config"]["seed"])
        self.saved = -1
        self.stop = threading.Event()
        if order["resume"]:
            self._resume(Path(order["resume"]))

    def train(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        _emit("STARTED", method="heft", resolved={"device": "cpu"}, rows=1, total_steps=self.steps,
              resumed_from=self.step)  # fmt: skip
        half = self.steps // 2
        while self.step < self.steps:
            self._one_step()
            if self.dies and self.step >= 2:
                os._exit(3)
            if self.stop.is_set():
                self._checkpoint("step")
                sys.exit(STOPPED)
            if self.step == half:
                self._checkpoint("stage")
            elif self.step % 2 == 0 and not self.dies:
                self._checkpoint("step")
        self._write_model(Path(self.order["out"]))
        evaluation = {"n": 2, "metric": "accuracy", "split": "validation", "results": []}
        tokens = 8 * self.steps
        _emit("SUCCEEDED", bundle=self.order["out"], evaluation=evaluation, parity={}, trained_tokens=tokens)

    def _one_step(self) -> None:
        time.sleep(self.seconds)
        self.step += 1
        self.state = after(self.state, self.step)
        _emit("METRICS", **self._stage(), step=self.step, total_steps=self.steps, epoch=0.5, loss=1 / self.step,
              learning_rate=0.001, tokens=8, seconds=self.seconds)  # fmt: skip

    def _stage(self) -> dict[str, Any]:
        index = int(self.step > self.steps // 2)
        return {"stage": ("lora", "reft")[index], "stage_index": index}

    def _checkpoint(self, kind: str) -> None:
        path = Path(self.order["checkpoint_dir"]) / f"{self.step:08d}-{kind}-{os.getpid()}"
        path.mkdir()
        (path / WEIGHTS).write_bytes(weights(self.state))
        values = {"step": self.step, "state": self.state, "salt": self.salt}
        (path / "state.json").write_text(json.dumps(values))
        if kind == "stage":
            self._write_model(path / "bundle")
        _seal(path)
        _emit("CHECKPOINT_SAVED", **self._stage(), step=self.step, kind=kind, path=str(path))

    def _write_model(self, path: Path) -> None:
        path.mkdir()
        (path / WEIGHTS).write_bytes(weights(self.state))
        (path / "heft.json").write_text(json.dumps({"task": {"type": "yes_no"}, "step": self.step}))
        _seal(path)

    def _resume(self, path: Path) -> None:
        """Loads a checkpoint without verifying it, so that a damaged one shows in the result."""
        values = json.loads((path / "state.json").read_text())
        self.step = values["step"]
        self.state = (path / WEIGHTS).read_bytes()[:32].hex()


def _seal(path: Path) -> None:
    """Syncs the files and then renames the manifest into place, as the engine does."""
    hashes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as content:
            hashes[str(file.relative_to(path))] = hashlib.file_digest(content, "sha256").hexdigest()
            os.fsync(content.fileno())
    partial = path / "manifest.json.partial"
    with partial.open("w") as out:
        json.dump(hashes, out)
        out.flush()
        os.fsync(out.fileno())
    os.rename(partial, path / "manifest.json")


def _emit(code: str, **data: Any) -> None:
    kind = "metrics" if code == "METRICS" else "message"
    event = {"code": code, "type": kind, "level": "info", "message": code.lower(), "data": data, "time": 0.0}
    print(json.dumps(event), flush=True)
