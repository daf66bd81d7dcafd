"""`diagnose` on whole bundles: the report matches the run, and every part has its plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_runs import LORA, REFT, but, config, parse, run, text, yes_no

from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.commands.main import main
from heft_engine.diagnostics.report import PARTS, Options, diagnose
from heft_engine.errors import ConfigError, RowError
from heft_engine.training.schedule import derived_seed

STRONG = but(LORA, learning_rate=0.05, alpha=64, n_epochs=1)
SMALL = Options(rows=24, curvature_rows=6, lanczos_steps=8, probes=4, descent_steps=6)


@pytest.fixture(scope="module")
def heft(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A HEFT bundle with intruder dimensions, and its evaluation."""
    out = tmp_path_factory.mktemp("diagnosed") / "heft"
    record = run(
        config(tiny_llama_dir, "heft", [STRONG, but(REFT, layers=[1], n_epochs=1)], seed=7),
        out,
        parse(yes_no(24)),
        parse(yes_no(8, seed=1)),
    )
    return out, record.one("SUCCEEDED")["evaluation"]


def test_a_report_has_every_part_and_a_plot_of_it(heft: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    bundle, evaluation = heft
    pulses: list[None] = []
    report = diagnose(
        bundle, parse(yes_no(30)), tmp_path / "out", SMALL, on_forward=lambda: pulses.append(None)
    )
    assert json.loads((tmp_path / "out" / "diagnostics.json").read_text()) == report
    assert set(PARTS) <= report.keys()
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert pictures.keys() == set(PARTS)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert pulses

    assert report["weights"]["stages"][0]["matrices"] == 8
    assert report["weights"]["stages"][0]["intruders"] > 0
    assert report["stage_two"] == {
        "kind": "loreft",
        "rank": 2,
        "layer": 1,
        "positions": "l1",
        "seed": derived_seed(7, 1),
    }
    states = report["representations"]
    assert 0 < states["cka"] < 1
    assert states["before"]["separability"]["probe_accuracy"] <= 1
    curvature = report["curvature"]
    assert curvature["before"]["largest"] > 0
    assert curvature["before"]["largest"] != curvature["after"]["largest"]
    assert curvature["before"]["parameters"] == 32 * 2 * 2 + 2
    assert len(report["descent"]["before"]) == len(report["descent"]["after"]) == 7
    losses = [loss["loss"] for loss in report["forgetting"]["losses"]]
    assert [loss["after"] for loss in report["forgetting"]["losses"]] == ["base", "lora", "reft"]
    assert losses == pytest.approx(evaluation["general_loss"], abs=1e-5)


def test_the_intervention_is_the_one_that_the_run_began_with(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Any] = []

    def unfreeze(self: LoreftIntervention) -> None:
        original(self)
        states.append(self.export_state())

    original = LoreftIntervention.unfreeze
    monkeypatch.setattr(LoreftIntervention, "unfreeze", unfreeze)
    run(
        config(tiny_llama_dir, "heft", [but(LORA, n_epochs=1), but(REFT, n_epochs=1)], seed=3), tmp_path / "b"
    )
    first = states[0]
    states.clear()
    diagnose(tmp_path / "b", parse(yes_no(6)), tmp_path / "out", Options(parts=("descent",), descent_steps=1))
    assert all((states[0][name] == tensor).all() for name, tensor in first.items())


@pytest.mark.parametrize(("method", "task"), [("lora", "text"), ("reft", "yes_no")])
def test_models_without_one_of_the_stages_have_what_there_is(
    tiny_llama_dir: Path, tmp_path: Path, method: str, task: str
) -> None:
    rows = parse(text(12)) if task == "text" else parse(yes_no(12))
    stages = {"lora": [but(LORA, n_epochs=1)], "reft": [but(REFT, n_epochs=1, kind="noreft")]}[method]
    run(config(tiny_llama_dir, method, stages), tmp_path / "bundle", rows)
    report = diagnose(tmp_path / "bundle", rows, tmp_path / "out", SMALL)
    assert ("weights" in report) == (method == "lora")
    assert ("after" in report["curvature"]) == ("after" in report["descent"]) == (method == "lora")
    assert ("cka" in report["representations"]) == (method == "lora")
    assert (report["representations"]["before"]["separability"] is None) == (task == "text")
    assert report["stage_two"]["kind"] == ("noreft" if method == "reft" else "loreft")
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(PARTS) & report.keys()


def test_the_command_writes_a_report(
    heft: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in yes_no(12)))
    general = tmp_path / "general.txt"
    general.write_text("the sea is a list of rivers and names. " * 200)
    arguments = ["--bundle", heft[0], "--data", rows, "--out", tmp_path / "out", "--general", general]
    command = ["diagnose", *map(str, arguments), "--part", "weights", "--part", "forgetting"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["plots"] == ["forgetting.png", "weights.png"]
    report = json.loads((tmp_path / "out" / answer["report"]).read_text())
    assert "curvature" not in report
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().out
    general.write_text("short")
    assert main([*command, "--out", str(tmp_path / "other")]) == 1
    assert "too short" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "other"), "--part", "mood"]) == 1
    assert "there is no part mood" in capsys.readouterr().out


def test_empty_data_and_a_non_empty_output_folder_are_refused(
    heft: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(RowError, match="at least one row"):
        diagnose(heft[0], [], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        diagnose(heft[0], parse(yes_no(4)), tmp_path)
