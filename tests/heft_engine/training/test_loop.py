"""The training loop: the computation of each step, its metrics, early stopping."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but, config, parse, run, tensors, yes_no

from heft_engine.adapters.reft import ReftAdapter
from heft_engine.config.train import EarlyStopping, LoraStage, ReftStage
from heft_engine.errors import ConfigError
from heft_engine.evaluation.evaluate import mean_loss
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.serving.predictor import load
from heft_engine.training import forward_pass, loop
from heft_engine.training.forward_pass import FullPass, loss_sums
from heft_engine.training.progress import Progress
from heft_engine.training.schedule import derived_seed

VALIDATION = parse(yes_no(16, seed=1))


# -- what a step computes


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    runs = [run(config(tiny_llama_dir, seed=s), tmp_path / str(i)) for i, s in enumerate((0, 0, 1))]
    first, again, other = runs
    assert first.losses == again.losses
    assert list(first.losses) == list(range(1, 13))
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(first).values(), tensors(again).values(), strict=True)
    )
    assert not set(first.losses.values()) & set(other.losses.values())


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int]] = []

    def recording(tokens_of: Any, indices: Any, budget: int) -> list[list[int]]:
        steps.append(list(indices))
        return forward_pass.split_by_tokens(tokens_of, indices, budget)

    monkeypatch.setattr(loop, "split_by_tokens", recording)
    run(config(tiny_llama_dir, "heft"), tmp_path / "out", parse(yes_no(20)))
    assert [len(step) for step in steps] == [8, 8, 4] * 4
    epochs = [tuple(itertools.chain(*steps[i : i + 3])) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({*epochs, tuple(range(20))}) == 5


@pytest.mark.parametrize("method", ["lora", "reft"])
def test_how_a_step_is_cut_changes_nothing_but_rounding(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A step's loss is a mean over its tokens: each part weighs by its tokens, not by its rows."""
    rows = parse([{"prompt": "Say", "completion": "sea " * n} for n in (1, 2, 5, 20) * 4])
    whole = run(config(tiny_llama_dir, method), tmp_path / "whole", rows)
    parts = []

    def split_small(tokens_of: Any, indices: Any, budget: int) -> list[list[int]]:
        parts.append(forward_pass.split_by_tokens(tokens_of, indices, 20))
        return parts[-1]

    monkeypatch.setattr(loop, "split_by_tokens", split_small)
    cut = run(config(tiny_llama_dir, method), tmp_path / "cut", rows)
    assert max(map(len, parts)) > 4
    assert cut.losses == pytest.approx(whole.losses, abs=2e-5)
    assert cut.losses != whole.losses


def test_a_step_s_loss_and_gradient_are_means_over_its_supervised_tokens(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's loss and gradient are those of the base with a fresh intervention."""
    rows = parse([{"prompt": "Say", "completion": "sea " * n} for n in (1, 2, 5, 20)])
    steps: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda ps, limit: steps.append([p.grad.clone() for p in ps])
    )
    stage = but(REFT, layers=[1])
    record = run(config(tiny_llama_dir, "reft", [stage]), tmp_path / "out", rows)

    lm = PackedLM(load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION))
    encoder = load(tmp_path / "out").encoder
    examples = [example.supervised() for row in rows for example in encoder.encode(row)]
    torch.manual_seed(derived_seed(0, 0))
    trainable = ReftAdapter.attach(lm, stage)
    objective = SupervisedObjective()
    loss, correct = loss_sums(FullPass(lm=lm, examples=examples), objective, range(4))
    mean = loss / objective.count(examples)
    mean.backward()
    assert record.losses[1] == pytest.approx(float(mean.detach()), abs=1e-5)
    assert record.data("METRICS")[0]["train_mean_token_accuracy"] == int(correct) / objective.count(examples)
    named = trainable.parameters().items()
    expected = [parameter.grad for name, parameter in named if name not in trainable.no_decay()]
    expected += [parameter.grad for name, parameter in named if name in trainable.no_decay()]
    for gradient, expected_gradient in zip(steps[0], expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "stage", [but(REFT, layers=[1, 2]), but(LORA, layers=[2]), but(REFT, positions="f1+l1")]
)
def test_a_cache_changes_nothing_but_rounding(
    tiny_llama_dir: Path, tmp_path: Path, stage: LoraStage | ReftStage
) -> None:
    stages = [but(REFT, layers=[0]), stage, but(LORA, layers=[3])]
    cached = run(config(tiny_llama_dir, "recipe", stages), tmp_path / "cached", None, VALIDATION)
    plain = run(
        config(tiny_llama_dir, "recipe", stages),
        tmp_path / "plain",
        None,
        VALIDATION,
        cache_memory_bytes=0,
    )
    levels = [[data["cache"]["rung"] for data in record.data("STAGE_STARTED")] for record in (cached, plain)]
    assert "nothing" not in levels[0]
    assert set(levels[1]) == {"nothing"}
    assert cached.losses == pytest.approx(plain.losses, abs=1e-4)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(
    tiny_llama_dir: Path, tmp_path: Path, scheduler: str
) -> None:
    stage = but(REFT, scheduler=scheduler, warmup_ratio=0.25, n_epochs=4, learning_rate=0.01)
    record = run(config(tiny_llama_dir, "reft", [stage]), tmp_path / "out")
    rates = [metrics["learning_rate"] for metrics in record.data("METRICS")]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])  # 3 of 12 steps, then the peak
    left = [1 - i / 9 for i in range(9)]
    shapes = {
        "linear": left,
        "cosine": [0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9)],
        "constant": [1.0] * 9,
    }
    assert rates[3:] == pytest.approx([0.01 * factor for factor in shapes[scheduler]])
    assert all(rate > 0 for rate in rates)


# -- early stopping


@pytest.mark.parametrize("stage", [but(LORA, n_epochs=30), but(REFT, n_epochs=30, learning_rate=0.1)])
def test_early_stopping_ends_a_stage_and_keeps_its_best(
    tiny_llama_dir: Path, tmp_path: Path, stage: LoraStage | ReftStage
) -> None:
    settings = config(tiny_llama_dir, "recipe", [stage], early_stopping=EarlyStopping(patience=2))
    record = run(settings, tmp_path / "out", None, VALIDATION)
    losses = [data["eval_loss"] for data in record.data("EPOCH_COMPLETE")]
    best = losses.index(min(losses))
    assert 0 < best < 27, "the stage must get better first, then worse"
    assert len(losses) == best + 3
    predictor = load(tmp_path / "out")
    examples = [e.supervised() for row in VALIDATION for e in predictor.encoder.encode(row)]
    assert mean_loss(predictor.lm, examples) == pytest.approx(losses[best], abs=1e-4)


def test_losses_and_token_accuracies_have_openais_names(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse([{"prompt": "Say", "completion": "sea " * n} for n in (1, 2, 5, 20) * 4])
    stage = but(REFT, n_epochs=4, learning_rate=0.1)
    record = run(config(tiny_llama_dir, "reft", [stage]), tmp_path / "out", rows, rows[:3])
    epochs, steps = record.data("EPOCH_COMPLETE"), record.data("METRICS")
    assert all(step["train_loss"] == step["loss"] for step in steps)
    assert len({epoch["valid_mean_token_accuracy"] for epoch in epochs}) > 1
    predictor = load(tmp_path / "out")
    examples = [example.supervised() for row in rows[:3] for example in predictor.encoder.encode(row)]
    with torch.inference_mode():
        loss, correct = loss_sums(
            FullPass(lm=predictor.lm, examples=examples), SupervisedObjective(), range(3)
        )
    count = SupervisedObjective().count(examples)
    last = epochs[-1]
    assert last["step"] == steps[-1]["step"]
    assert last["valid_loss"] == last["full_valid_loss"] == last["eval_loss"]
    assert last["valid_loss"] == pytest.approx(float(loss) / count, abs=1e-5)
    assert last["valid_mean_token_accuracy"] == last["full_valid_mean_token_accuracy"] == int(correct) / count
    per_epoch = len(steps) // len(epochs)
    of_epoch = [step["train_mean_token_accuracy"] for step in steps[-per_epoch:]]
    assert min(of_epoch) <= last["train_mean_token_accuracy"] <= max(of_epoch)


def test_early_stopping_needs_validation_rows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs validation rows") as refused:
        run(config(tiny_llama_dir, early_stopping=EarlyStopping()), tmp_path / "out")
    assert refused.value.param == "early_stopping"


def test_metrics_count_on(tiny_llama_dir: Path, tmp_path: Path) -> None:
    record = run(config(tiny_llama_dir, "heft"), tmp_path / "out")
    metrics = record.data("METRICS")
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert {m["total_steps"] for m in metrics} == {12}
    assert [m["epoch"] for m in metrics] == [1, 1, 1, 2, 2, 2] * 2
    assert [(m["stage"], m["stage_index"]) for m in metrics] == [("lora", 0)] * 6 + [("reft", 1)] * 6
    for stage in (metrics[:6], metrics[6:]):
        assert all(a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in pairwise(stage))


def test_a_cache_on_disk_leaves_nothing_behind(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "to be made"
    limits = {"cache_memory_bytes": 0, "cache_disk_bytes": 10**9}
    on_disk = run(config(tiny_llama_dir, "reft"), folder / "disk", None, VALIDATION, **limits)
    in_memory = run(config(tiny_llama_dir, "reft"), tmp_path / "memory", None, VALIDATION)
    assert on_disk.one("STAGE_STARTED")["cache"]["on_disk"]
    assert on_disk.losses == in_memory.losses
    assert list(folder.iterdir()) == [folder / "disk"]


def test_a_checkpoint_of_another_version_is_read_for_what_is_known() -> None:
    earlier = Progress(step=3, cache={"rung": "nothing", "bytes": 0, "on_disk": False})
    assert Progress.of({**asdict(earlier), "saved_seconds": 2.5}) == earlier
    assert Progress.of({"step": 3}) == Progress(step=3)
