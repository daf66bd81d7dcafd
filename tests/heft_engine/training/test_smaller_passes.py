"""Training passes that run out of memory: they are run again in smaller ones, and the result is that of those."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from engine_runs import LORA, REFT, RunRecord, assert_equal, but, config, interrupted, parse, run, yes_no
from memory_limit import limit_pass_tokens

from heft_engine.config.train import LoraStage, ReftStage
from heft_engine.errors import TrainingError
from heft_engine.model.loss import LossSums
from heft_engine.objectives.objective import Objective
from heft_engine.training import loop, plan
from heft_engine.training.forward_pass import ForwardPass

LimitTokens = Callable[..., None]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.fixture
def limit_tokens(monkeypatch: pytest.MonkeyPatch) -> LimitTokens:
    """`limit_tokens(n, error, training=True)` lets passes of more than n tokens fail when they have computed the loss.

    Those with a gradient, or those without.
    """
    loss_sums = loop.loss_sums

    def limit(tokens: int, error: Exception, *, training: bool = True) -> None:
        def limited(forward: ForwardPass, objective: Objective, indices: Sequence[int]) -> LossSums:
            sums = loss_sums(forward, objective, indices)  # dropout has drawn its random numbers
            if sum(map(forward.tokens, indices)) > tokens and torch.is_grad_enabled() == training:
                raise error
            return sums

        monkeypatch.setattr(loop, "loss_sums", limited)
        monkeypatch.setattr(gc, "collect", lambda: 0)  # of a whole test session it takes a third of a second

    return limit


def warned_budgets(record: RunRecord) -> list[int]:
    """Returns the token budgets that warnings name."""
    warnings = [event for event in record.events if event.data.get("signature") == "out_of_memory"]
    assert all((event.code, event.level) == ("WARNING", "warn") for event in warnings)
    return [int(event.message.split("passes of up to ")[2].split(";")[0]) for event in warnings]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(("stage", "limit"), [(but(LORA, dropout=0.3), 60), (REFT, 20)], ids=["lora", "reft"])
def test_a_step_without_memory_is_run_again_in_smaller_passes(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_tokens: LimitTokens,
    stage: LoraStage | ReftStage,
    limit: int,
    error: Exception,
) -> None:
    """Its gradients and random numbers are those of a stage that had the smaller budget from the start."""
    settings = config(tiny_llama_dir, "lora" if stage.type == "lora" else "reft", [stage])
    with monkeypatch.context():
        limit_tokens(limit, error)
        survived = run(settings, tmp_path / "survived")
    monkeypatch.undo()
    budgets = warned_budgets(survived)
    assert budgets != []
    assert budgets == sorted(budgets, reverse=True)
    if not stage.dropout:
        whole = run(settings, tmp_path / "whole")
        assert survived.losses == pytest.approx(whole.losses, abs=1e-4)
    monkeypatch.setattr(plan, "TOKEN_BUDGET", budgets[-1])
    small = run(settings, tmp_path / "small")
    assert warned_budgets(small) == []
    assert survived.losses == small.losses
    assert_equal(survived, small)


def test_a_lowered_budget_outlives_a_restart(
    tiny_llama_dir: Path, tmp_path: Path, limit_tokens: LimitTokens
) -> None:
    settings = config(tiny_llama_dir, "lora", [but(LORA, dropout=0.3)])
    limit_tokens(60, ERRORS[0])
    whole = run(settings, tmp_path / "whole")
    losses, last = interrupted(settings, tmp_path, [2])
    assert losses == whole.losses
    assert warned_budgets(whole) != []
    assert warned_budgets(last) == [], "the checkpoint has the budget that fits"


def test_validation_without_memory_is_run_again_too(
    tiny_llama_dir: Path, tmp_path: Path, limit_tokens: LimitTokens
) -> None:
    settings, rows = config(tiny_llama_dir, "lora", [LORA]), parse(yes_no(16, seed=1))
    whole = run(settings, tmp_path / "whole", validation=rows)
    limit_tokens(100, ERRORS[0], training=False)
    survived = run(settings, tmp_path / "survived", validation=rows)
    assert warned_budgets(survived) != []
    first, second = (record.data("EPOCH_COMPLETE")[0]["eval_loss"] for record in (whole, survived))
    assert second == pytest.approx(first, abs=1e-5)


def test_a_row_that_does_not_fit_alone_fails_the_run(
    tiny_llama_dir: Path, tmp_path: Path, limit_tokens: LimitTokens
) -> None:
    limit_tokens(1, ERRORS[0])
    record = RunRecord()
    with pytest.raises(
        TrainingError, match=r"one row alone, of \d+ tokens at most: lower max_length"
    ) as failed:
        run(config(tiny_llama_dir, "lora", [LORA]), tmp_path / "out", record=record)
    assert (failed.value.code, failed.value.param) == ("out_of_memory", "max_length")
    assert record.losses == {}


def test_a_run_whose_every_pass_runs_out_of_memory_ends_as_the_others(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, cached activations, evaluation, the checks of merges and probe rows: all go on in smaller passes."""
    settings, rows = config(tiny_llama_dir, max_length=128), parse(yes_no(16, seed=1))
    whole = run(settings, tmp_path / "whole", validation=rows)
    passes = limit_pass_tokens(monkeypatch, 130)
    survived = run(settings, tmp_path / "survived", validation=rows)
    assert len([tokens for tokens in passes if tokens > 130]) > 5
    assert warned_budgets(survived) != []
    assert survived.losses == pytest.approx(whole.losses, abs=1e-3)
    assert survived.one("MERGE_VERIFIED")["float32"] < 1e-4
    for mine, theirs in zip(survived.data("EVALUATION"), whole.data("EVALUATION"), strict=True):
        assert mine["accuracy"] == theirs["accuracy"]


def test_another_failure_is_not_taken_for_a_lack_of_memory(
    tiny_llama_dir: Path, tmp_path: Path, limit_tokens: LimitTokens
) -> None:
    limit_tokens(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(config(tiny_llama_dir, "lora", [LORA]), tmp_path / "out")
