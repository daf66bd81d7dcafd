"""Every kind of intervention against pyreft's: same outputs, same losses, and files that both read."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pyreft
import pytest
import torch
from engine_runs import LORA, but, config, parse, run, yes_no
from real_pyreft import (
    copy_raw,
    interventions,
    label_logits,
    own_class,
    padded,
    plain,
    reft_model,
    train_steps,
)
from small_runs import (
    load_inputs,
    put_interventions,
    questions,
    reft,
    step_losses,
    steps_of,
    train_inputs,
    yes_no_rows,
)
from torch.testing import assert_close

from heft_engine.adapters.reft import KINDS
from heft_engine.bundle.export import export
from heft_engine.bundle.pyreft_format import read_pyreft
from heft_engine.errors import BundleError
from heft_engine.events import Event
from heft_engine.inference.scoring import score
from heft_engine.serving.predictor import load

CLOSE = 2e-5
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_an_intervention_computes_what_pyrefts_does(kind: str) -> None:
    torch.manual_seed(0)
    theirs = own_class(kind)(embed_dim=32, low_rank_dimension=4, dtype=torch.float32, add_bias=False)
    ours = KINDS[kind](32, 4)
    copy_raw(ours, theirs)
    hidden = torch.randn(7, 32)
    assert_close(ours(hidden), theirs(hidden), rtol=0, atol=1e-6)
    assert (ours(hidden) - hidden).abs().max() > 0.05
    assert_close(ours(hidden, 0.5), hidden + 0.5 * (ours(hidden) - hidden), rtol=0, atol=1e-6)
    served = KINDS[kind](32, 4, trainable=False)
    served.load_exported_state(ours.export_state())
    ours.freeze()
    assert torch.equal(served(hidden), ours(hidden))


@each_kind
def test_twenty_steps_have_the_losses_of_pyrefts_trainer(
    tiny_llama_dir: Path, tmp_path: Path, kind: str
) -> None:
    stage = reft(kind=kind, layers=[1], learning_rate=2e-2)
    events: list[Event] = []
    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows(16))
    (ours,) = put_interventions(inputs.lm, stage)
    theirs = reft_model(plain(tiny_llama_dir), [1], rank=4, kind=kind)
    copy_raw(ours, interventions(theirs)[0])
    steps = [padded(examples, ["l1"]) for examples in steps_of(inputs)]
    expected = train_steps(theirs, steps, learning_rate=2e-2)
    train_inputs(inputs, tmp_path / "bundle", events.append)
    losses = step_losses(events)
    assert losses == pytest.approx(expected, abs=CLOSE)
    assert len(losses) == 20
    assert fmean(losses[-4:]) < fmean(losses[:4]) - 0.01


@pytest.fixture(scope="module")
def exported(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model with an intervention of every kind, as a bundle, as pyreft's directory and with its base merged."""
    folder = tmp_path_factory.mktemp("kinds")
    stages = [
        but(LORA, n_epochs=1),
        *(reft(kind=kind, layers=[at % 4], rank=2 + at % 2, n_epochs=1) for at, kind in enumerate(KINDS)),
    ]
    run(config(tiny_llama_dir, "recipe", stages), folder / "bundle", parse(yes_no(12)))
    export(folder / "bundle", "pyreft", folder / "pyreft")
    export(folder / "bundle", "merged", folder / "merged")
    return folder


def loaded(folder: Path) -> Any:
    """Loads the exported directory into pyreft, which can't make NoReFT's and NodiReFT's modules by itself."""
    base = plain(folder / "merged")
    representations, files = [], sorted((folder / "pyreft").glob("intkey_*"))
    for intervention in read_pyreft(folder / "pyreft"):
        (file,) = [path for path in files if f"layer_{intervention.layer}_" in path.name][:1]
        files.remove(file)
        module = own_class(intervention.kind)(
            embed_dim=32, low_rank_dimension=intervention.rank, dtype=torch.float32, add_bias=False
        )
        module.set_interchange_dim(32)
        module.load_state_dict(torch.load(file))
        place = {
            "layer": intervention.layer,
            "component": "block_output",
            "low_rank_dimension": intervention.rank,
        }
        representations.append({**place, "intervention": module})
    return pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))


def test_pyreft_reads_every_kind_and_gives_the_same_scores(exported: Path) -> None:
    predictor = load(exported / "bundle")
    examples = questions(predictor.encoder, yes_no_rows(12))
    logits = label_logits(loaded(exported), examples, ["l1"] * len(KINDS))
    scores = torch.tensor([row_scores.totals for row_scores in score(predictor.lm, examples)])
    assert_close(scores, logits, rtol=0, atol=CLOSE)
    without = torch.tensor([row_scores.totals for row_scores in score(predictor.lm, examples, scale=0.0)])
    assert (scores - without).abs().max() > 0.1


def test_every_kind_is_read_back_as_it_was(exported: Path) -> None:
    stored = load(exported / "bundle").lm.interventions
    again = read_pyreft(exported / "pyreft")
    assert [intervention.kind for intervention in again] == list(KINDS)
    for intervention, mine in zip(again, stored, strict=True):
        state = mine.intervention.export_state()
        assert state.keys() == intervention.state.keys()
        for name in state:
            assert_close(intervention.state[name], state[name], rtol=0, atol=1e-6)


def test_what_pyreft_saves_of_every_kind_is_read(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for kind, cls in KINDS.items():
        theirs = reft_model(plain(tiny_llama_dir), [2], rank=3, kind=kind)
        theirs.save(str(tmp_path / kind))
        (intervention,) = read_pyreft(tmp_path / kind, positions="l1")
        assert (intervention.kind, intervention.rank, intervention.layer) == (kind, 3, 2)
        hidden = torch.randn(5, 32)
        (their,) = interventions(theirs)
        assert_close(intervention.restore(32).intervention(hidden), their(hidden), rtol=0, atol=1e-6)
        assert intervention.state.keys() == cls.shapes(32, 3).keys()


def test_noreft_with_a_bias_of_its_projection_is_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    theirs = pyreft.NoreftIntervention(embed_dim=32, low_rank_dimension=3, dtype=torch.float32, add_bias=True)
    from heft_engine.bundle.pyreft_format import _read_intervention

    torch.save(theirs.state_dict(), path / "one.bin")
    intervention = _read_intervention(path / "one.bin", 0, "l1", "noreft")
    hidden = torch.randn(5, 32)
    assert_close(intervention.restore(32).intervention(hidden), theirs(hidden), rtol=0, atol=1e-6)


def test_a_file_of_another_kind_is_refused(exported: Path) -> None:
    from heft_engine.bundle.pyreft_format import _read_intervention

    file = next((exported / "pyreft").glob("intkey_layer_2_*"))  # consreft
    with pytest.raises(BundleError, match="does not hold rotate_layer, weight, bias"):
        _read_intervention(file, 2, "l1", "loreft")


def test_only_r_and_biases_are_kept_from_weight_decay() -> None:
    for kind, cls in KINDS.items():
        intervention = cls(32, 4)
        decaying = {name for name, _ in intervention.named_parameters()} - intervention.no_decay()
        expected = {"learned_source.weight"} if cls.reads else set()
        assert decaying == expected | (set() if cls.rotated else {"proj_layer.weight"}), kind
