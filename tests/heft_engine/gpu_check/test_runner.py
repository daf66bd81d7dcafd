"""`gpu-check` as a command: a process a part, one line each, and a report whatever happens."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heft_engine.commands.main import main
from heft_engine.gpu_check.parts import PARTS
from heft_engine.gpu_check.report import gpu_name, markdown
from heft_engine.gpu_check.runner import run_parts

MACHINE = next(part for part in PARTS if part.name == "machine")
CPU = ["--device", "cpu", "--small"]


def test_without_a_gpu_it_says_so_and_is_content(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 0
    assert capsys.readouterr().out == "torch finds no GPU on this machine: there is nothing to check\n"


def test_the_command_prints_a_line_a_part_and_writes_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["gpu-check", *CPU, "--parts", "machine", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0])["part"] == "machine"
    report = (tmp_path / "cpu.md").read_text()
    assert "\n".join(lines[1:]).strip() == report.strip()
    assert "| Versions, products and copies | passed |" in report
    assert f'torch": "{torch.__version__}' in report


#: Stands in for the command: hangs, dies or passes, as the part's name says.
STAND_IN = """
import json, os, sys, time
name = sys.argv[2]
if name == "hangs":
    time.sleep(600)
if name == "dies":
    sys.stderr.write("CUDA error: misaligned address")
    os.abort()
print(json.dumps({"part": name, "status": "passed", "seconds": 0, "figures": {}, "failures": []}))
"""


def test_a_part_that_dies_or_hangs_costs_its_own_result_only() -> None:
    parts = [replace(MACHINE, name="hangs", seconds=0.2)]
    parts += [replace(MACHINE, name=name) for name in ("dies", "passes")]
    hung, dead, passed = run_parts(parts, CPU, command=[sys.executable, "-c", STAND_IN])
    assert (hung["part"], hung["status"], hung["error"]) == ("hangs", "error", "ended after 0 s")
    assert dead["status"] == "error"
    assert "exit code -6" in dead["error"]
    assert "misaligned address" in dead["error"]
    assert passed["status"] == "passed"


def test_no_part_begins_when_time_is_up() -> None:
    results = list(run_parts(PARTS, CPU, total_seconds=5))
    assert {result["status"] for result in results} == {"not run"}
    report = markdown(results, PARTS, "python -m heft_engine gpu-check")
    assert report.startswith("# GPU check: no GPU\n")
    assert report.count("| not run | 0.0 |") == len(PARTS)
    assert gpu_name(results) is None


def test_a_failed_part_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"part": "machine", "status": "failed", "seconds": 1.0, "figures": {}, "failures": ["slow"]}
    monkeypatch.setattr("heft_engine.commands.gpu_check.run_parts", lambda parts, arguments: iter([failed]))
    assert main(["gpu-check", *CPU, "--parts", "machine"]) == 1
    captured = capsys.readouterr()
    assert "- **failed**: slow" in captured.out
    assert "these parts have not passed: machine" in captured.err


def test_it_checks_one_gpu_and_says_why_it_checks_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["gpu-check", "--device", "auto"]) == 1
    assert "name it (cuda, cuda:1)" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["gpu-check", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "the CPU was chosen: there is nothing to check\n"
