"""Directories that the real pyreft saved are read, scored, trained further, made into bundles or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_pyreft import (
    copy_raw,
    interventions,
    label_logits,
    load_exactly,
    padded,
    plain,
    reft_model,
    rotation_error,
    train_steps,
)
from small_runs import load_inputs, questions, reft, step_losses, steps_of, train_inputs, yes_no_rows
from torch.testing import assert_close

from heft_engine.adapters.reft import MAX_ROTATION_ERROR
from heft_engine.bundle.pyreft_format import read_pyreft
from heft_engine.commands.main import main
from heft_engine.config.train import ReftStage, TrainConfig
from heft_engine.errors import BundleError, ConfigError
from heft_engine.events import Event
from heft_engine.inference.scoring import score
from heft_engine.serving.predictor import load
from heft_engine.training.pyreft_import import import_pyreft

CLOSE = 2e-5


@pytest.fixture(scope="module")
def trained(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model that pyreft trained for ten steps at two layers, and the directory it saved."""
    torch.manual_seed(0)
    theirs = reft_model(plain(tiny_llama_dir), [1, 2], rank=4)
    inputs = load_inputs(tiny_llama_dir, [reft()], yes_no_rows())
    batches = [padded(examples, ["l1", "l1"]) for examples in steps_of(inputs)]
    train_steps(theirs, batches[:10], learning_rate=2e-2)
    folder = tmp_path_factory.mktemp("pyreft") / "saved"
    theirs.save(str(folder))
    return theirs, folder


def test_what_pyreft_trained_gets_the_same_scores_here(
    trained: tuple[Any, Path], tiny_llama_dir: Path
) -> None:
    theirs, folder = trained
    inputs = load_inputs(tiny_llama_dir, [reft()], yes_no_rows())
    examples = questions(inputs.encoder, yes_no_rows(20))
    before = torch.tensor([row_scores.totals for row_scores in score(inputs.lm, examples)])
    inputs.lm.interventions.extend(
        intervention.restore(inputs.lm.hidden_size) for intervention in read_pyreft(folder, positions="l1")
    )
    scores = torch.tensor([row_scores.totals for row_scores in score(inputs.lm, examples)])
    assert_close(scores, label_logits(theirs, examples, ["l1", "l1"]), rtol=0, atol=CLOSE)
    assert (scores - before).abs().max() > 0.1


def test_training_goes_on_from_what_pyreft_saved_and_R_stays_a_rotation(
    trained: tuple[Any, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    _, folder = trained
    events: list[Event] = []
    stage = reft(layers=[1, 2], n_epochs=10, learning_rate=2e-2)
    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows())
    interventions = read_pyreft(folder, positions="l1")
    inputs.lm.interventions.extend(
        intervention.restore(inputs.lm.hidden_size) for intervention in interventions
    )
    bundle = train_inputs(inputs, tmp_path / "bundle", events.append)
    assert len(bundle.interventions) == 2
    losses = step_losses(events)
    assert sum(losses[-3:]) < sum(losses[:3])
    for intervention, stored in zip(interventions, bundle.interventions, strict=True):
        rotation = stored.state["rotate_layer"]
        assert torch.linalg.matrix_norm(rotation.T @ rotation - torch.eye(4)) < 1e-5
        assert (rotation - intervention.state["rotate_layer"]).abs().max() > 0.01


def test_pyrefts_own_load_leaves_an_R_that_training_breaks(
    trained: tuple[Any, Path], tiny_llama_dir: Path
) -> None:
    """This is why `unfreeze` completes the parametrisation's base by itself."""
    _, folder = trained
    loaded = load_exactly(folder, plain(tiny_llama_dir))
    assert max(map(rotation_error, interventions(loaded))) < 1e-5
    inputs = load_inputs(tiny_llama_dir, [reft()], yes_no_rows())
    train_steps(loaded, [padded(e, ["l1", "l1"]) for e in steps_of(inputs)][:10], learning_rate=2e-2)
    assert max(map(rotation_error, interventions(loaded))) > MAX_ROTATION_ERROR


def test_a_component_named_by_its_path_is_a_decoder_layer_too(
    trained: tuple[Any, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import pyreft

    (first, _) = interventions(trained[0])
    intervention = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=4, dtype=torch.float32)
    copy_raw(first, intervention)
    config = pyreft.ReftConfig(
        representations={
            "component": "model.layers[3].output",
            "low_rank_dimension": 4,
            "intervention": intervention,
        }
    )
    pyreft.get_reft_model(plain(tiny_llama_dir), config).save(str(tmp_path / "saved"))
    (intervention,) = read_pyreft(tmp_path / "saved", positions="f2")
    assert (intervention.layer, intervention.rank, intervention.positions) == (3, 4, "f2")
    assert torch.equal(intervention.state["rotate_layer"], first.rotate_layer.weight)


def test_each_intervention_may_have_positions_of_its_own(trained: tuple[Any, Path]) -> None:
    interventions = read_pyreft(trained[1], positions=["f1", "l1"])
    assert [(intervention.layer, intervention.positions) for intervention in interventions] == [
        (1, "f1"),
        (2, "l1"),
    ]


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this pickle has run",))


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def _first_field(index: int, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["representations"][0][index] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = min(folder.glob("intkey_*"))
        torch.save(change(torch.load(path)), path)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _edit(intervention_types=["<class 'pyreft.interventions.NoreftIntervention'>"] * 2),
            "hold proj_layer",
        ),
        (_edit(intervention_types=["<class 'os.system'>"] * 2), "kind os.system"),
        (_edit(representations=[]), "must name interventions"),
        (_edit(representations=7), "not pyvene's"),
        (_first_field(1, "mlp_output"), "at mlp_output"),
        (_first_field(1, "../../layers[1].output"), "interventions at"),
        (_first_field(2, "h.pos"), "units"),
        (_first_field(3, 2), "units"),
        (_first_field(9, 1), "intervention_link_key"),
        (lambda folder: (folder / "config.json").unlink(), "config.json can't be read"),
        (lambda folder: min(folder.glob("intkey_*")).unlink(), "can't be read"),
        (lambda folder: min(folder.glob("intkey_*")).write_bytes(b"damaged"), "can't be read"),
        (_tensors(lambda state: _Code()), "can't be read"),
        (_tensors(lambda state: {"weight": state["weight"]}), "does not hold"),
        (_tensors(lambda state: state | {"bias": state["weight"]}), "don't fit together"),
        (_tensors(lambda state: state | {"rotate_layer": 2 * state["rotate_layer"]}), "holds no rotation"),
    ],
)
def test_what_is_not_loreft_at_a_layers_output_is_refused(
    trained: tuple[Any, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    damage(folder)
    with pytest.raises(BundleError, match=message):
        read_pyreft(folder, positions="l1")
    assert "has run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("positions", "message"), [(None, "give positions"), ("x1", "form f1, l1"), (["l1"], "1 pos")]
)
def test_positions_must_be_told(trained: tuple[Any, Path], positions: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_pyreft(trained[1], positions=positions)


def test_an_imported_directory_becomes_a_bundle_that_answers_as_pyreft_did(
    trained: tuple[Any, Path], tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, folder = trained
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"passage": row.passage, "question": row.question, "answer": row.answer}) + "\n"
            for row in yes_no_rows()
        )
    )
    arguments = [
        "--directory",
        folder,
        "--model",
        tiny_llama_dir,
        "--rows",
        rows,
        "--out",
        tmp_path / "bundle",
    ]
    command = ["import-pyreft", *map(str, arguments), "--positions", "l1", "--set", "dtype=float32"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [1, 2]

    predictor = load(tmp_path / "bundle")
    examples = questions(predictor.encoder, yes_no_rows(20))
    expected = label_logits(theirs, examples, ["l1", "l1"]).softmax(-1)
    for row, prediction in zip(expected, predictor.predict(yes_no_rows(20)), strict=True):
        assert prediction.label_probabilities is not None
        assert list(prediction.label_probabilities.values()) == pytest.approx(row.tolist(), abs=CLOSE)

    assert main([*command, "--set", "reft.rank=2"]) == 1
    assert "the directory defines the intervention" in capsys.readouterr().err


def test_an_import_needs_a_base_that_has_the_layer(
    trained: tuple[Any, Path], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[1], tmp_path / "copy")
    for path in folder.glob("intkey_layer_2*"):
        path.rename(path.with_name(path.name.replace("layer_2", "layer_9")))
    config = json.loads((folder / "config.json").read_text())
    config["representations"][1][0] = 9
    (folder / "config.json").write_text(json.dumps(config))
    settings = TrainConfig(model=str(tiny_llama_dir), stages=[ReftStage()], dtype="float32")
    with pytest.raises(ConfigError, match="layer 9"):
        import_pyreft(folder, settings, yes_no_rows(), tmp_path / "bundle", positions="l1")
