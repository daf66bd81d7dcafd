"""Compares interrupted with uninterrupted runs of the real engine, and loads damaged checkpoints: `make chaos-resume`.

For each seed a tiny model is trained once without and once with an interruption at a random step of each stage. The run
is stopped (it writes a checkpoint) or killed (it resumes from its last one). In float32 on a CPU the weights must be
equal bit for bit; in bfloat16 the losses are compared. Then bits are flipped and files truncated in copies of a
checkpoint: neither the engine nor the service's storage may accept any of them.

One line of JSON is appended to `--results`; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

import ledger
import torch
from engine_runs import LORA, REFT, RunRecord, but, config, parse, run, tensors, yes_no
from faults.damage import damage
from tiny_models import save_tiny_model

from heft_engine.config.train import TrainConfig, recipe
from heft_engine.errors import BundleError, Stopped
from heft_engine.runtime.sealed_directory import MANIFEST, verify
from store.errors import Damaged
from store.storage.artifacts import Artifacts

RESULTS = ledger.FOLDER / "resume.jsonl"
VALIDATION = parse(yes_no(8, seed=1))
STAGES = ("lora", "reft")
#: bfloat16 has 8 bits of mantissa.
_ROUNDING = 2.0**-8


class Cut(BaseException):
    """Stands for a SIGKILL: nothing in the engine catches it."""


def settings(model: Path, seed: int, dtype: str) -> TrainConfig:
    """Returns a config with dropout, so that the random state matters, and two epochs, so that the row order does."""
    stages = recipe("heft", but(LORA, dropout=0.1), but(REFT, dropout=0.1))
    return config(model, "heft", stages, seed=seed, dtype=dtype)


def straight(plan: TrainConfig, folder: Path) -> RunRecord:
    return run(plan, folder / "straight", None, VALIDATION)


def interrupted(plan: TrainConfig, folder: Path, step: int, *, softly: bool) -> RunRecord:
    """Runs two attempts, of which the first ends at this step; returns the second."""
    told, checkpoints = RunRecord(), folder / "checkpoints"

    def heard(event: Any) -> None:
        list.append(told.events, event)
        if not softly and event.code == "METRICS" and event.data["step"] == step:
            raise Cut

    told.events = _Listening(heard)
    try:
        run(
            plan, folder / "out", None, VALIDATION, record=told, checkpoint_dir=checkpoints,
            checkpoint_seconds=1e9 if softly else 0.0,
            should_stop=lambda: softly and max(told.losses, default=0) >= step,
        )  # fmt: skip
    except (Cut, Stopped):
        pass
    else:
        raise AssertionError(f"it was not interrupted at step {step}")
    saved = [Path(data["path"]) for data in told.data("CHECKPOINT_SAVED")]
    torch.manual_seed(step)  # a new process has another random state
    return run(
        plan,
        folder / "out",
        None,
        VALIDATION,
        checkpoint_dir=checkpoints,
        resume=saved[-1] if saved else None,
    )


class _Listening(list[Any]):
    def __init__(self, heard: Any) -> None:
        super().__init__()
        self.append = heard  # type: ignore[method-assign]


def compare(model: Path, seeds: range) -> dict[str, Any]:
    """Returns how many runs interrupted in each stage differ by a bit."""
    differ = dict.fromkeys(STAGES, 0)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan = settings(model, seed, "float32")
            whole = straight(plan, folder)
            for index, stage in enumerate(STAGES):
                random = Random(f"{seed}/{stage}")
                half = len(whole.losses) // 2
                step = index * half + random.randint(1, half - 1)
                again = interrupted(plan, folder / stage, step, softly=random.random() < 0.5)
                differ[stage] += not _equal(whole, again)
    return differ


def compare_bfloat16(model: Path, seeds: int) -> float:
    """Returns the largest relative difference of a step's loss."""
    largest = 0.0
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan = settings(model, seed, "bfloat16")
            whole = straight(plan, folder)
            step = Random(seed).randint(1, len(whole.losses) - 1)
            again = interrupted(plan, folder / "again", step, softly=True)
            differences = (abs(again.losses[n] / whole.losses[n] - 1) for n in again.losses)
            largest = max(largest, *differences, 0.0)
    return largest


def _equal(one: RunRecord, other: RunRecord) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def damaged(model: Path, count: int) -> dict[str, int]:
    """Returns how many damaged checkpoints the engine and the storage accepted."""
    random, loaded = Random(count), {"engine": 0, "storage": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = run(settings(model, 0, "float32"), folder / "out", checkpoint_dir=folder / "checkpoints")
        sound = Path(told.data("CHECKPOINT_SAVED")[-1]["path"])
        verify(sound)
        artifacts = Artifacts(folder.as_uri())
        manifest = artifacts.put_directory("stored", sound)
        names = sorted(manifest)
        for number in range(count):
            name = names[number % len(names)]
            copy = Path(shutil.copytree(sound, folder / "copy"))
            damage(random, copy / name)
            loaded["engine"] += _passes(lambda copy=copy: verify(copy), BundleError)
            os.replace(copy / name, folder / "stored" / name)
            loaded["storage"] += _passes(
                lambda: artifacts.fetch_directory("stored", folder / "fetched", manifest), Damaged
            )
            shutil.copy(sound / name, folder / "stored" / name)
            shutil.rmtree(copy)
        artifacts.fetch_directory("stored", folder / "whole", manifest)
        assert MANIFEST in names
    return loaded


def _passes(do: Any, refusal: type[Exception]) -> bool:
    try:
        do()
    except refusal:
        return False
    return True


def measure(*, seeds: range, bfloat16_seeds: int, damages: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        model = save_tiny_model(Path(name) / "tiny")
        return {
            **ledger.stamp(),
            "seeds": len(seeds),
            "differ": compare(model, seeds),
            "bfloat16_seeds": bfloat16_seeds,
            "bfloat16_largest_difference": compare_bfloat16(model, bfloat16_seeds),
            "damaged": damages,
            "damaged_loaded": damaged(model, damages),
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="seed; parts of one commit add up")
    parser.add_argument("--bfloat16-seeds", type=int, default=10)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    result = measure(seeds=seeds, bfloat16_seeds=options.bfloat16_seeds, damages=options.damages)
    ledger.add(options.results, result)
    bad = any(itertools.chain(result["differ"].values(), result["damaged_loaded"].values()))
    return int(bad or result["bfloat16_largest_difference"] > _ROUNDING)


if __name__ == "__main__":
    sys.exit(main())
