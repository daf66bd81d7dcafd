"""The optimizer's step: that of torch's AdamW, also where memory runs out in it; and the loss scale of float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, RunRecord, assert_equal, but, config, run
from torch import Tensor, nn

from heft_engine.errors import OutOfMemory
from heft_engine.runtime import out_of_memory
from heft_engine.training.optimization.loss_scale import LossScale
from heft_engine.training.optimization.optimizer import BETAS, EPSILON, StageOptimizer

STAGE = but(LORA, weight_decay=0.1, max_grad_norm=0.5)
RATES = (1e-2, 5e-3, 1e-3)
Values = dict[str, Tensor]


@pytest.fixture(autouse=True)
def quick_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory.gc, "collect", lambda: 0)  # of a whole test session it takes long


def new_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 4)) for name in ("decays", "also", "constant")}


def optimizer_of(parameters: dict[str, nn.Parameter], dtype: torch.dtype = torch.float32) -> StageOptimizer:
    return StageOptimizer(STAGE, parameters, {"constant"}, dtype)


def set_gradients(parameters: dict[str, nn.Parameter], step: int, factor: float = 1.0) -> None:
    for index, parameter in enumerate(parameters.values()):
        generator = torch.Generator().manual_seed(10 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * factor


def values(parameters: dict[str, nn.Parameter], optimizer: StageOptimizer) -> Values:
    named = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return named | {name: tensor.clone() for name, tensor in optimizer.tensors().items()}


def trained(prepare: Callable[[int], None] = lambda step: None) -> Values:
    """Returns parameters and state after three steps. prepare: called before each of them."""
    parameters = new_parameters()
    optimizer = optimizer_of(parameters)
    for step, rate in enumerate(RATES):
        set_gradients(parameters, step)
        prepare(step)
        assert optimizer.step(rate)
    return values(parameters, optimizer)


def assert_same(mine: Values, others: Values) -> None:
    assert mine.keys() == others.keys()
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, others[name])] == []


def test_steps_are_those_of_adamw_with_clipped_gradients() -> None:
    parameters = new_parameters()
    constant = parameters["constant"]
    decaying = [parameters["decays"], parameters["also"]]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": [constant], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    for step, rate in enumerate(RATES):
        set_gradients(parameters, step)
        for group in adamw.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_([*decaying, constant], 0.5)
        adamw.step()
    mine = trained()
    assert [name for name, tensor in parameters.items() if not torch.equal(mine[name], tensor)] == []
    assert torch.equal(mine["adam/exp_avg_sq/also"], adamw.state[parameters["also"]]["exp_avg_sq"])


class Failing:
    """A step of AdamW that has changed all but the last parameter when memory runs out, for the first `times`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.times, self.step = times, torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda adamw, *_: self.fail(adamw))

    def fail(self, adamw: torch.optim.AdamW) -> Any:
        if self.times == 0:
            return self.step(adamw)
        self.times -= 1
        constant = adamw.param_groups[1]["params"][0]
        gradient, constant.grad = constant.grad, None
        self.step(adamw)
        constant.grad = gradient
        constant.data += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("failing_step", [0, 1])
def test_a_step_without_memory_is_taken_again_from_where_it_began(
    monkeypatch: pytest.MonkeyPatch, failing_step: int
) -> None:
    expected = trained()
    failing = Failing(monkeypatch, times=0)

    def prepare(step: int) -> None:
        failing.times = int(step == failing_step)

    assert_same(trained(prepare), expected)


def test_a_step_that_has_no_memory_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = new_parameters()
    optimizer = optimizer_of(parameters)
    set_gradients(parameters, 0)
    optimizer.step(1e-2)
    before = values(parameters, optimizer)
    set_gradients(parameters, 1)
    Failing(monkeypatch, times=2)
    with pytest.raises(OutOfMemory, match="optimizer's step: lower rank") as caught:
        optimizer.step(1e-2)
    assert caught.value.code == "out_of_memory"
    assert optimizer.is_restored
    assert_same(values(parameters, optimizer), before)


def test_gradients_are_clipped_once_though_memory_runs_out_while_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = trained()
    clip, calls = nn.utils.clip_grad_norm_, []

    def fail_first(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) % 2:
            raise MemoryError
        return clip(*arguments)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", fail_first)
    assert_same(trained(), expected)
    assert len(calls) == 2 * len(RATES)


def test_a_stage_without_memory_for_adams_state_ends_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    parameters = new_parameters()
    monkeypatch.setattr(torch, "zeros_like", fail)
    with pytest.raises(OutOfMemory):
        optimizer_of(parameters)


def test_a_checkpoint_before_the_first_step_may_lack_adams_state() -> None:
    parameters = new_parameters()
    optimizer = optimizer_of(parameters)
    optimizer.restore({})
    for step, rate in enumerate(RATES):
        set_gradients(parameters, step)
        optimizer.step(rate)
    assert_same(values(parameters, optimizer), trained())


def test_a_run_whose_steps_run_out_of_memory_ends_as_any_other(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_llama_dir, "lora", [but(LORA, dropout=0.3)])
    whole = run(settings, tmp_path / "whole")
    step, calls = torch.optim.AdamW.step, []

    def fail_every_other(adamw: torch.optim.AdamW, *_: Any) -> Any:
        result = step(adamw)
        calls.append(1)
        if len(calls) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", fail_every_other)
    survived = run(settings, tmp_path / "survived")
    assert len(calls) == 2 * len(whole.losses)
    assert survived.losses == whole.losses
    assert_equal(survived, whole)


def test_a_run_that_ends_in_the_optimizers_step_loses_nothing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from a checkpoint of the step before, with the same random numbers."""
    settings = config(tiny_llama_dir, "lora", [but(LORA, dropout=0.3)])
    whole = run(settings, tmp_path / "whole")
    step, calls, record = torch.optim.AdamW.step, [], RunRecord()

    def fail_from_the_third(adamw: torch.optim.AdamW, *_: Any) -> Any:
        result = step(adamw)
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fail_from_the_third)
        with pytest.raises(OutOfMemory):
            run(settings, tmp_path / "first", record=record, checkpoint_dir=tmp_path / "checkpoints")
    assert list(record.losses) == [1, 2]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    torch.manual_seed(1)
    rest = run(settings, tmp_path / "rest", resume=checkpoint)
    assert record.losses | rest.losses == whole.losses
    assert_equal(rest, whole)


def test_gradients_that_overflow_change_nothing_and_halve_the_scale() -> None:
    parameters = new_parameters()
    optimizer = optimizer_of(parameters, torch.float16)
    loss = sum(parameter.sum() for parameter in parameters.values())
    optimizer.loss_scale.scaled(loss).backward()
    before = values(parameters, optimizer)
    parameters["also"].grad[1, 1] = torch.inf  # type: ignore[index]
    assert not optimizer.step(1e-2)
    assert optimizer.loss_scale.value == 2.0**15
    after = values(parameters, optimizer)
    assert after.pop("loss_scale/scale") == 2**15
    before.pop("loss_scale/scale")
    assert_same(after, before)


def test_steps_with_a_loss_scale_are_those_without() -> None:
    """The scale is a power of two, so that nothing is rounded."""
    parameters, plain = new_parameters(), new_parameters()
    scaled, unscaled = optimizer_of(parameters, torch.float16), optimizer_of(plain)
    for step, rate in enumerate(RATES):
        scaled.loss_scale.scaled(torch.zeros(()))
        set_gradients(parameters, step, factor=scaled.loss_scale.value)
        set_gradients(plain, step)
        assert scaled.step(rate)
        assert unscaled.step(rate)
    assert [name for name in plain if not torch.equal(parameters[name], plain[name])] == []


def test_a_loss_scale_continues_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = LossScale(torch.device("cpu"), torch.float16)
    tensors = {
        "loss_scale/scale": torch.tensor(512.0),
        "loss_scale/steps_without_overflow": torch.tensor(1_999),
    }
    scale.restore(tensors)
    assert scale.value == 512
    parameters = new_parameters()
    adamw = torch.optim.AdamW(parameters.values())
    assert scale.scaled(torch.ones(())) == 512
    set_gradients(parameters, 0)
    scale.unscale(adamw)
    scale.step(adamw)
    assert scale.update()
    assert scale.value == 1_024, "after 2,000 steps"
    assert {name: float(tensor) for name, tensor in scale.tensors().items()} == {
        "loss_scale/scale": 1_024,
        "loss_scale/steps_without_overflow": 0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_no_loss_scale(dtype: torch.dtype) -> None:
    scale = LossScale(torch.device("cpu"), dtype)
    loss = torch.ones((), requires_grad=True)
    assert scale.scaled(loss) is loss
    assert (scale.value, scale.tensors(), scale.report(0)) == (1.0, {}, {})
