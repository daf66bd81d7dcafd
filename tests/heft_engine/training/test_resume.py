"""A run that is stopped anywhere and resumed equals an uninterrupted one, bit for bit (float32, CPU)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_runs import LORA, REFT, RunRecord, assert_equal, but, config, interrupted, parse, run, yes_no

from heft_engine.bundle.format import read_bundle
from heft_engine.config.train import EarlyStopping, Stage, TrainConfig, recipe
from heft_engine.errors import Stopped
from heft_engine.serving.predictor import load

VALIDATION = parse(yes_no(16, seed=1))
DROPOUT = {"dropout": 0.2}


def stages(method: Any, **both: Any) -> list[Stage]:
    return recipe(method, but(LORA, **both), but(REFT, **both))


CASES: dict[str, Callable[[Path], TrainConfig]] = {
    "heft": lambda model: config(model, "heft"),
    "dropout": lambda model: config(model, "heft_reversed", stages("heft_reversed", **DROPOUT)),
    # The second ReFT stage goes on with the first one's intervention, raw rotation and all.
    "interleaved": lambda model: config(
        model,
        "heft_interleaved",
        recipe(
            "heft_interleaved",
            but(LORA, **DROPOUT),
            but(REFT, **DROPOUT, positions="f1+l1", layers=[0, 2]),
        ),
    ),
    # The last stage goes on with the first one's intervention.
    "kinds": lambda model: config(
        model, "recipe", [but(REFT, kind=kind, n_epochs=1) for kind in ("direft", "noreft", "direft")]
    ),
    "early stopping": lambda model: config(
        model,
        "heft",
        stages("heft", n_epochs=9, learning_rate=0.05),
        early_stopping=EarlyStopping(patience=1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_never_stopped(tiny_llama_dir: Path, tmp_path: Path, case: str) -> None:
    settings = CASES[case](tiny_llama_dir)
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    assert (len(whole.losses) < whole.one("STARTED")["total_steps"]) == (case == "early stopping")
    # Once after every step, and once at every epoch's end.
    calls = len(whole.losses) + len(whole.data("EPOCH_COMPLETE"))
    stops = sorted(random.Random(case).sample(range(1, calls), 8))
    losses, last = interrupted(settings, tmp_path / "parts", stops, VALIDATION)
    assert losses == whole.losses
    assert_equal(last, whole)


def test_stopped_at_every_place_of_a_stage(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The stops include those between an epoch's last step and its end, and right before the next stage."""
    settings = config(tiny_llama_dir, "heft_reversed", stages("heft_reversed", **DROPOUT, batch_size=12))
    whole = run(settings, tmp_path / "whole", None, VALIDATION)
    assert len(whole.losses) == 8
    losses, last = interrupted(settings, tmp_path / "parts", list(range(1, 13)), VALIDATION)
    assert losses == whole.losses
    assert_equal(last, whole)


def test_resumed_from_a_stage_s_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = CASES["interleaved"](tiny_llama_dir)
    whole = run(settings, tmp_path / "whole", None, VALIDATION, checkpoint_dir=tmp_path / "checkpoints")
    ends = sorted((tmp_path / "checkpoints").glob("*-stage"))
    assert len(ends) == 4
    for index, end in enumerate(ends):
        again = run(settings, tmp_path / f"again-{index}", None, VALIDATION, resume=end)
        steps = [step for step in whole.losses if step > 6 * (index + 1)]
        assert again.losses == {step: whole.losses[step] for step in steps}
        assert_equal(again, whole)


def test_a_stage_goes_on_with_the_cache_it_began_with(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The cache level stays the same whatever memory is free after the restart: another would round differently."""
    settings = config(tiny_llama_dir, "reft")
    whole = run(settings, tmp_path / "whole", None, VALIDATION, cache_memory_bytes=0)
    calls = itertools.count(1)
    record = RunRecord()
    with pytest.raises(Stopped):
        run(
            settings,
            tmp_path / "out",
            None,
            VALIDATION,
            record=record,
            checkpoint_dir=tmp_path / "checkpoints",
            should_stop=lambda: next(calls) == 2,
            cache_memory_bytes=0,
        )
    resume = Path(record.data("CHECKPOINT_SAVED")[-1]["path"])
    again = run(settings, tmp_path / "out", None, VALIDATION, resume=resume, cache_memory_bytes=10**9)
    assert again.data("STAGE_STARTED")[0]["cache"]["rung"] == "nothing"
    assert_equal(again, whole)


@pytest.mark.parametrize("method", ["heft", "heft_interleaved"])
def test_a_stage_s_bundle_is_the_model_so_far(tiny_llama_dir: Path, tmp_path: Path, method: str) -> None:
    """A checkpoint of a stage's end holds a bundle that answers as the run evaluated it."""
    record = run(
        config(tiny_llama_dir, method),
        tmp_path / "out",
        None,
        VALIDATION,
        checkpoint_dir=tmp_path / "checkpoints",
    )
    evaluations = record.data("EVALUATION")[1:]
    ends = sorted((tmp_path / "checkpoints").glob("*-stage"))
    assert len(ends) == len(evaluations)
    for index, (end, evaluation) in enumerate(zip(ends, evaluations, strict=True)):
        info = read_bundle(end / "bundle").info
        assert len(info.stages) == index + 1
        assert info.evaluation is not None
        assert info.evaluation["results"][-1]["accuracy"] == evaluation["accuracy"]
        answers = load(end / "bundle", device="cpu").predict(VALIDATION)
        right = sum(answer.answer == row.answer for answer, row in zip(answers, VALIDATION, strict=True))
        assert right == evaluation["correct"]
