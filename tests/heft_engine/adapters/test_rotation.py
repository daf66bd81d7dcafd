"""R stays a rotation, despite weight decay, restarts and checkpoints."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import load_inputs, put_interventions, reft, train_inputs, yes_no_rows
from torch import Tensor

from heft_engine.adapters.reft import LoreftIntervention, rotation_error
from heft_engine.errors import Stopped, TrainingError
from heft_engine.events import Event
from heft_engine.runtime.sealed_directory import MANIFEST
from heft_engine.training.setup import RunInputs

HIDDEN, RANK = 32, 4
RAW = "rotate_layer.parametrizations.weight.original"  #: with ±1 on its diagonal
BASE = "rotate_layer.parametrizations.weight.0.base"


@pytest.fixture
def intervention() -> LoreftIntervention:
    torch.manual_seed(0)
    return LoreftIntervention(HIDDEN, RANK)


def teach(intervention: LoreftIntervention, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Trains towards random targets; each step's data depends on its number alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        hidden, target = torch.randn(2, 16, HIDDEN, generator=generator)
        optimizer.zero_grad()
        (intervention(hidden) - target).square().mean().backward()
        optimizer.step()


def adamw(intervention: LoreftIntervention, decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with the parameter groups of the training loop."""
    named = dict(intervention.named_parameters())
    plain = [named.pop(name) for name in sorted(intervention.no_decay())]
    decaying = list(named.values())
    groups = [{"params": decaying, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def test_weight_decay_set_by_the_user_never_touches_R(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def train(decay: float, name: str) -> tuple[float, dict[str, Tensor]]:
        stage = reft(weight_decay=decay, n_epochs=17, batch_size=4)
        inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows(12))
        (ours,) = put_interventions(inputs.lm, stage)
        began = ours.rotation.detach().clone()
        train_inputs(inputs, tmp_path / name)
        assert (ours.rotation - began).abs().max() > 0.01
        return rotation_error(ours), ours.export_state()

    error, decayed = train(0.1, "decayed")
    assert error < 1e-5
    _, free = train(0.0, "free")
    assert decayed["weight"].norm() < free["weight"].norm()


def test_weight_decay_on_everything_makes_R_zero_and_is_noticed(intervention: LoreftIntervention) -> None:
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=1e-2, weight_decay=0.1)
    teach(intervention, optimizer, range(3))
    assert not intervention.rotation.any()
    hidden = torch.randn(5, HIDDEN)
    assert torch.equal(intervention(hidden), hidden)
    with pytest.raises(TrainingError, match="collapsed") as refusal:
        intervention.check()
    assert refusal.value.code == "rotation_collapsed"


@pytest.mark.parametrize(("broken", "code"), [(0.99998, "rotation_collapsed"), (float("nan"), "diverged")])
def test_a_run_whose_R_collapses_fails_and_keeps_no_checkpoint_of_it(
    tiny_llama_dir: Path, tmp_path: Path, broken: float, code: str
) -> None:
    """The diagonal is moved by what one step of AdamW with weight decay would move it, or is no number any more."""
    stage = reft()

    def collapse(event: Event) -> None:
        if event.code == "METRICS" and event.data["step"] == 7:
            (placed,) = inputs.lm.interventions
            placed.intervention.get_parameter(RAW).data.fill_diagonal_(broken)

    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows(16))
    folder = tmp_path / "checkpoints"
    with pytest.raises(TrainingError) as refusal:
        train_inputs(inputs, tmp_path / "bundle", collapse, checkpoint_dir=folder, checkpoint_seconds=0)
    assert refusal.value.code == code
    saved = [int(path.parent.name.split("-")[0]) for path in folder.glob(f"*/{MANIFEST}")]
    assert max(saved) == 6


def test_freezing_and_thawing_keep_R_and_let_it_train(intervention: LoreftIntervention) -> None:
    began = intervention.rotation.detach().clone()
    intervention.freeze()
    assert torch.equal(intervention.rotation, began)
    assert not any(parameter.requires_grad for parameter in intervention.parameters())
    intervention.unfreeze()
    assert torch.allclose(intervention.rotation, began, atol=1e-6)
    teach(intervention, adamw(intervention), range(50))
    assert rotation_error(intervention) < 1e-5
    assert (intervention.rotation - began).abs().max() > 0.1


def test_raw_state_goes_on_bit_for_bit_and_baked_R_does_not(intervention: LoreftIntervention) -> None:
    """This is why checkpoints hold the raw parameter and the parametrisation's base."""
    optimizer = adamw(intervention)
    teach(intervention, optimizer, range(20))
    raw, baked, adam = (
        intervention.raw_state(),
        intervention.export_state(),
        deepcopy(optimizer.state_dict()),
    )
    teach(intervention, optimizer, range(20, 60))

    def resumed(load: Callable[[LoreftIntervention], object]) -> LoreftIntervention:
        torch.manual_seed(1)
        other = LoreftIntervention(HIDDEN, RANK)
        load(other)
        again = adamw(other)
        again.load_state_dict(adam)
        teach(other, again, range(20, 60))
        return other

    exact = resumed(lambda other: other.load_state_dict(raw))
    assert all(
        torch.equal(exact.raw_state()[name], tensor) for name, tensor in intervention.raw_state().items()
    )

    def load_exported_state(other: LoreftIntervention) -> None:
        other.load_exported_state(baked)
        other.unfreeze()

    drifted = resumed(load_exported_state)
    assert rotation_error(drifted) < 1e-5
    assert (drifted.rotation - intervention.rotation).abs().max() > 0.01


def test_a_stopped_stage_goes_on_to_the_same_R(tiny_llama_dir: Path, tmp_path: Path) -> None:
    def inputs() -> RunInputs:
        return load_inputs(tiny_llama_dir, [reft()], yes_no_rows(16))

    whole = train_inputs(inputs(), tmp_path / "whole")
    stop = iter([False] * 6 + [True])
    folder = tmp_path / "checkpoints"
    with pytest.raises(Stopped):
        train_inputs(inputs(), tmp_path / "never", should_stop=lambda: next(stop), checkpoint_dir=folder)
    checkpoint = max(folder.iterdir())
    saved = load_file(checkpoint / "state.safetensors")
    assert saved[f"buffer/0.{BASE}"].shape == (HIDDEN, HIDDEN)
    assert saved[f"parameter/0.{RAW}"].diagonal().abs().tolist() == [1.0] * RANK

    resumed = train_inputs(inputs(), tmp_path / "resumed", resume=checkpoint)
    for name, tensor in whole.interventions[0].state.items():
        assert torch.equal(tensor, resumed.interventions[0].state[name])
