"""Exports in pyreft's format: the real pyreft loads them and gives the scores of this engine."""

import json
from pathlib import Path

import pytest
import torch
from real_pyreft import (
    label_logits,
    load_exactly,
    plain,
)
from small_runs import load_inputs, questions, reft, train_inputs, yes_no_rows
from torch.testing import assert_close

from heft_engine.bundle.export import export
from heft_engine.bundle.format import Bundle
from heft_engine.bundle.pyreft_format import read_pyreft
from heft_engine.config.train import LoraStage
from heft_engine.inference.scoring import score
from heft_engine.serving.predictor import load

CLOSE = 2e-5
#: Two interventions at layer 2, so that pyvene's running numbers are in use.
STAGES = [
    LoraStage(n_epochs=1, batch_size=4, learning_rate=1e-2),
    reft(layers=[1, 2], n_epochs=2),
    reft(layers=[2], rank=2, positions="f1+l1", n_epochs=2),
]


@pytest.fixture(scope="module")
def bundle(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """HEFT with interventions at two layers and then one more."""
    out = tmp_path_factory.mktemp("bundles") / "heft"
    return train_inputs(load_inputs(tiny_llama_dir, STAGES, yes_no_rows()), out)


@pytest.fixture(scope="module")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the bundle in pyreft's format, and the merged base that it belongs to."""
    folder = tmp_path_factory.mktemp("exports")
    export(bundle.path, "merged", folder / "merged")
    export(bundle.path, "pyreft", folder / "pyreft")
    return folder


def test_pyreft_loads_an_export_and_gives_the_predictors_scores(bundle: Bundle, exported: Path) -> None:
    rows = yes_no_rows(20)
    predictor = load(bundle.path)
    theirs = load_exactly(exported / "pyreft", plain(exported / "merged"))
    positions = [intervention.positions for intervention in bundle.interventions]
    assert positions == ["l1", "l1", "f1+l1"]
    examples = questions(predictor.encoder, rows)

    logits = label_logits(theirs, examples, positions)
    scores = torch.tensor([row_scores.totals for row_scores in score(predictor.lm, examples)])
    assert_close(scores, logits, rtol=0, atol=CLOSE)
    without = torch.tensor([row_scores.totals for row_scores in score(predictor.lm, examples, scale=0.0)])
    assert (scores - without).abs().max() > 0.1
    for row, prediction in zip(logits.softmax(-1), predictor.predict(rows), strict=True):
        assert prediction.label_probabilities is not None
        assert list(prediction.label_probabilities.values()) == pytest.approx(row.tolist(), abs=CLOSE)


def test_pyreft_as_it_is_agrees_on_a_bfloat16_base_up_to_its_noise(bundle: Bundle, exported: Path) -> None:
    import pyreft

    predictor = load(bundle.path)
    examples = questions(predictor.encoder, yes_no_rows(20))
    theirs = pyreft.ReftModel.load(str(exported / "pyreft"), plain(exported / "merged", torch.bfloat16))
    positions = [intervention.positions for intervention in bundle.interventions]
    logits = label_logits(theirs, examples, positions).float()
    scores = torch.tensor([row_scores.totals for row_scores in score(predictor.lm, examples)])
    assert_close(scores, logits, rtol=0, atol=0.05)


def test_an_export_says_what_pyreft_has_no_field_for(bundle: Bundle, exported: Path) -> None:
    ours = json.loads((exported / "pyreft" / "heft.json").read_text())
    assert ours["task"] == bundle.info.task
    assert ours["merged_adapters"] == 1
    assert [(i["key"], i["rank"], i["positions"]) for i in ours["interventions"]] == [
        ("layer_1_comp_block_output_unit_pos_nunit_1#0", 4, "l1"),
        ("layer_2_comp_block_output_unit_pos_nunit_1#0", 4, "l1"),
        ("layer_2_comp_block_output_unit_pos_nunit_1#1", 2, "f1+l1"),
    ]


def test_an_export_has_the_files_and_the_config_that_pyreft_writes(exported: Path, tmp_path: Path) -> None:
    theirs = load_exactly(exported / "pyreft", plain(exported / "merged"))
    theirs.save(str(tmp_path / "again"))
    own_files = {path.name for path in (exported / "pyreft").iterdir()}
    assert own_files - {"heft.json"} == {path.name for path in (tmp_path / "again").iterdir()}
    mine, again = (
        json.loads((d / "config.json").read_text()) for d in (exported / "pyreft", tmp_path / "again")
    )
    assert mine == {name: value for name, value in again.items() if name != "transformers_version"}


def test_an_export_is_read_back_bit_for_bit(bundle: Bundle, exported: Path) -> None:
    interventions = read_pyreft(exported / "pyreft")
    assert [(s.layer, s.rank, s.positions) for s in interventions] == [
        (s.layer, s.rank, s.positions) for s in bundle.interventions
    ]
    for intervention, stored in zip(interventions, bundle.interventions, strict=True):
        assert intervention.state.keys() == stored.state.keys()
        assert all(torch.equal(intervention.state[name], stored.state[name]) for name in stored.state)
