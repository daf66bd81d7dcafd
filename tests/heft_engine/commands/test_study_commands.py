"""The commands behind studies: compare and suggest, JSON in and out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from heft_engine.commands.main import main
from heft_engine.evaluation.row_values import pack_correctness, pack_graded


def test_compare_answers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def arm(name: str, right: int) -> dict[str, object]:
        packed = pack_correctness([i < right for i in range(50)])
        runs = [{"seed": seed, "n": 50, "rows_sha256": "x", "right": packed} for seed in (1, 2)]
        return {"name": name, "seeds": [1, 2], "runs": runs}

    path = tmp_path / "question.json"
    path.write_text(json.dumps({"arms": [arm("a", 40), arm("b", 10)]}))
    assert main(["compare", "--run-file", str(path)]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert [arm_report["accuracy"] for arm_report in verdict["arms"]] == [0.8, 0.2]
    assert verdict["comparisons"][0]["separable"]
    graded = {"seed": 1, "n": 3, "rows_sha256": "x", "values": pack_graded([0.5, 1.0, 0.0])}
    path.write_text(json.dumps({"arms": [{"name": "a", "seeds": [1], "runs": [graded]}]}))
    assert main(["compare", "--run-file", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][0]["accuracy"] == pytest.approx(0.5, abs=1e-5)
    path.write_text("{}")
    assert main(["compare", "--run-file", str(path)]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["param"] == "arms"


def test_the_command_answers_and_loads_no_torch(tmp_path: Path) -> None:
    question = {
        "space": {"rank": [2, 4], "rate": {"low": 1e-5, "high": 1e-3, "log": True}},
        "budget": 4,
        "sampler": "tpe",
        "seed": 1,
        "trials": [{"point": {"rank": 2, "rate": 1e-4}, "state": "complete", "value": 0.5}],
        "count": 2,
    }
    path = tmp_path / "question.json"
    path.write_text(json.dumps(question))
    script = (
        "import sys; from heft_engine.commands.main import main; code = main();"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "suggest", "--run-file", str(path)], capture_output=True, check=True
    )
    points = json.loads(done.stdout)["points"]
    assert [sorted(point) for point in points] == [["rank", "rate"]] * 2
