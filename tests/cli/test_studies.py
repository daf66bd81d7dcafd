"""`heft studies`: requests, output and reports."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.errors import CommandError
from cli.report.data import Report, layer_and_rank, losses
from cli.report.page import page
from cli.report.plots import against_compute, curves, layer_rank_map
from cli.report.text import flops, markdown
from cli.study_body import arm_body, grid_body, parse_seeds, search_or_budget, space_body

SENTENCE = "HEFT 3+3 is 1.2 points above LoRA <alone>, 95 % interval −0.4 to 2.8: not separable with 3 seeds."


def an_arm(name: str, layer: int = 1, rank: int = 2, accuracy: float | None = 0.8) -> dict[str, Any]:
    known = accuracy is not None
    return {
        "name": name,
        "method": {"type": "heft", "heft": {"lora": {}, "reft": {"layers": [layer], "rank": rank}}},
        "jobs": [{"id": f"ftjob-{name}", "seed": 1, "status": "succeeded" if known else "failed"}],
        "accuracy": accuracy,
        "interval_95": [accuracy - 0.05, accuracy + 0.05] if accuracy is not None else None,
        "per_seed": [{"seed": 1, "accuracy": accuracy}, {"seed": 2, "accuracy": accuracy}] if known else [],
        "flops": 3.21e12 * layer if known else None,
        "seconds": 61.0 if known else None,
        "trained_parameters": 1_234 if known else None,
    }


def a_report(*arms: dict[str, Any], **changes: Any) -> Report:
    model = {"seed": 1, "only_a": 9, "only_b": 4, "difference": 0.012, "interval_95": [-0.01, 0.03],
             "p_value": 0.27, "p_adjusted": 0.54}  # fmt: skip
    study = {
        "id": "study_1",
        "object": "study",
        "name": "table | <b>of</b> $3",
        "status": "succeeded",
        "model": "smollm2-135m",
        "training_file": "file-a",
        "validation_file": None,
        "test_file": "file-b",
        "seeds": [1, 2],
        "arms": list(arms),
        "comparisons": [{"a": "a", "b": "b", "sentence": SENTENCE, "models": [model]}],
    }
    return Report(
        study=study | changes, curves={arm["name"]: [(1, 2.0), (2, 1.0)] for arm in arms if arm["accuracy"]}
    )


class Tags(HTMLParser):
    """Collects the tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_arms_and_grids_use_the_settings_of_jobs() -> None:
    assert arm_body("narrow: heft reft.rank=2 max_length=64") == {
        "name": "narrow",
        "method": {"type": "heft", "heft": {"reft": {"rank": 2}}},
        "set": {"max_length": 64},
    }
    assert arm_body("LoRA alone: lora lora.n_epochs=20")["method"] == {
        "type": "lora",
        "lora": {"n_epochs": 20},
    }
    assert grid_body(["reft.layers=10,15", 'reft.positions=["l1","f1+l1"]']) == {
        "reft.layers": [10, 15],
        "reft.positions": ["l1", "f1+l1"],
    }
    assert parse_seeds("1,2,3") == [1, 2, 3]
    for fault in (
        lambda: arm_body("no colon"),
        lambda: arm_body("a:"),
        lambda: grid_body(["x"]),
        lambda: parse_seeds("x"),
    ):
        with pytest.raises(CommandError):
            fault()


def test_a_table_of_losses_is_averaged_to_a_short_curve() -> None:
    table = (
        "step,stage,train_loss\n"
        + "".join(f"{step},lora,{step}.0\n" for step in range(1, 401))
        + "400,lora,\n"
    )
    curve = losses(table)
    assert len(curve) == 200
    assert curve[0] == (2, 1.5)
    assert losses("step,stage,train_loss\n") == []


def test_markdown_has_every_number_and_escapes_names() -> None:
    text = markdown(a_report(an_arm("a|b"), an_arm("gone", accuracy=None)))
    assert "# table \\| \\<b\\>of\\</b\\> $3" in text
    assert "| a\\|b | 80.0 % | 75.0 to 85.0 % | 1: 80.0 %, 2: 80.0 % | 3.21 TFLOP | 1:01 | 1,234 |" in text
    assert "| gone |  |  | 1: failed |  |  |  |" in text
    assert "- HEFT 3+3 is 1.2 points above LoRA \\<alone\\>" in text
    assert "| a | b | 1 | 9 | 4 | +1.2 | −1.0 to +3.0 | 0.270 | 0.540 |" in text


def test_the_page_is_self_contained() -> None:
    text = page(a_report(*(an_arm(f"{layer} {rank}", layer, rank) for layer in (1, 2) for rank in (2, 4))))
    tags = Tags(text).seen
    assert [tag for tag, _ in tags].count("svg") == 3
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    loaded = [
        value for _, attrs in tags for name, value in attrs.items() if name in ("src", "xlink:href", "href")
    ]
    assert all((value or "").startswith(("#", "data:")) for value in loaded)
    assert "<b>of" not in text
    assert "LoRA &lt;alone&gt;" in text


def test_plots_show_the_arms() -> None:
    arms = [an_arm(f"{layer} {rank}", layer, rank, 0.5 + layer / 10) for layer in (1, 2) for rank in (2, 4)]
    for svg in (against_compute(arms), layer_rank_map(arms), curves(a_report(*arms))):
        assert svg is not None
        ElementTree.fromstring(re.sub(r"xlink:href", "href", svg))  # well-formed
    shown = against_compute(arms)
    assert shown is not None
    assert shown == against_compute(arms)
    assert "2 4" in shown
    cells = layer_rank_map(arms)
    assert cells is not None
    assert cells.count("60.0") >= 2


def test_there_is_no_plot_without_data() -> None:
    gone = an_arm("gone", accuracy=None)
    assert against_compute([gone]) is None
    assert layer_rank_map([gone]) is None
    assert layer_rank_map([an_arm("a", 1, 2), an_arm("b", 2, 2)]) is None  # one rank is no map
    assert curves(a_report(gone)) is None
    assert layer_and_rank({"method": {"type": "lora", "lora": {}}}) is None


@pytest.mark.parametrize(
    ("value", "text"), [(3.2e15, "3.2 PFLOP"), (5e9, "5 GFLOP"), (12.0, "12 FLOP"), (None, "")]
)
def test_operations_have_a_readable_unit(value: float | None, text: str) -> None:
    assert flops(value) == text


def test_the_command_sends_a_study_and_writes_its_report(service: Any, tmp_path: Path) -> None:
    study = a_report(an_arm("a")).study
    service.on("POST /v1/studies", (200, study))
    run = service.run(
        *("studies", "create", "--name", "ranks", "--model", "m", "--training-file", "file-a"),
        *("--test-file", "file-b", "--grid", "reft.rank=2,4", "--set", "lora.rank=2", "--seeds", "1"),
    )
    assert run.exit_code == 0, run.output
    assert run.stdout.strip() == "study_1"
    assert service.bodies[-1][1] == {
        "name": "ranks",
        "model": "m",
        "seeds": [1],
        "dry_run": False,
        "method": {"type": "heft", "heft": {"lora": {"rank": 2}}},
        "grid": {"reft.rank": [2, 4]},
        "training_file": "file-a",
        "test_file": "file-b",
    }

    service.on("GET /v1/studies/study_1", (200, study))
    service.on("GET /v1/fine_tuning/jobs/ftjob-a", (200, {"result_files": ["file-r"]}))
    service.on("GET /v1/files/file-r/content", (200, b"step,train_loss\n1,2.0\n2,1.0\n"))
    for name in ("report.html", "report.json", "report.md"):
        run = service.run("studies", "report", "study_1", "--out", str(tmp_path / name))
        assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "report.json").read_text())["curves"] == {"a": [[1, 2.0], [2, 1.0]]}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "report.md").read_text().startswith("# table")


def test_watching_a_study_prints_its_events_and_its_status(service: Any) -> None:
    events = [{"id": "2", "message": "The study has ended."}, {"id": "1", "message": "Created."}]
    service.on("GET /v1/studies/study_1", (200, {"status": "failed"}))
    service.on("GET /v1/studies/study_1/events?limit=100", (200, {"data": events, "has_more": False}))
    run = service.run("studies", "watch", "study_1")
    assert run.exit_code == 1
    assert run.stdout.splitlines() == ["Created.", "The study has ended."]


def test_a_search_is_written_as_lists_and_ranges() -> None:
    assert space_body(
        ["reft.rank=2,4", "reft.learning_rate=1e-5..1e-3:log", "lora.rank=2..16", "reft.positions=l1,f1+l1"]
    ) == {
        "reft.rank": [2, 4],
        "reft.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "lora.rank": {"low": 2, "high": 16},
        "reft.positions": ["l1", "f1+l1"],
    }
    for fault in ("reft.rank", "reft.rank=", "reft.rank=2..8:squared"):
        with pytest.raises(CommandError):
            space_body([fault])


def test_the_command_sends_a_search(service: Any) -> None:
    service.on("POST /v1/studies", (200, {"id": "study_1"}))
    files = ("--training-file", "file-a", "--validation-file", "file-b", "--test-file", "file-c")
    search = ("--search", "reft.rank=2,4", "--budget", "6", "--sampler", "random", "--parallel", "3")
    run = service.run("studies", "create", "--name", "s", "--model", "m", *files, *search)
    assert run.exit_code == 0, run.output
    assert service.bodies[-1][1] == {
        "name": "s",
        "model": "m",
        "dry_run": False,
        "search": {"space": {"reft.rank": [2, 4]}, "budget": 6, "sampler": "random", "parallel": 3},
        "training_file": "file-a",
        "validation_file": "file-b",
        "test_file": "file-c",
    }
    assert service.run("studies", "create", "--sampler", "random").exit_code == 1


def test_options_override_the_search_of_a_file() -> None:
    written = {"space": {"lora.rank": [4]}, "budget": 9, "sampler": "random"}
    assert search_or_budget(["reft.rank=2,4"], written, budget=5, sampler=None, parallel=None) == {
        "search": {"space": {"reft.rank": [2, 4]}, "budget": 5, "sampler": "random"}
    }


def test_invalid_tasks_are_refused(service: Any, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"name": "s", "tasks": "boolq"}')
    run = service.run("studies", "create", "--from", str(tmp_path / "study.json"))
    assert run.exit_code == 1
    assert '"tasks" must be a list of objects' in run.output


def test_a_request_from_a_file_is_sent_with_its_files_uploaded(service: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    task = {"name": "a", "training_file": str(rows), "test_file": "file-t"}
    body = {"name": "tasks", "preset": "cross_task", "model": "m", "tasks": [task, {**task, "name": "b"}]}
    path = tmp_path / "study.json"
    path.write_text(json.dumps(body))
    service.on("POST /v1/files", (200, {"id": "file-r"}))
    service.on("POST /v1/studies", (200, {"id": "study_1"}))
    run = service.run("studies", "create", "--from", str(path), "--model", "other", "--seeds", "4,5")
    assert run.exit_code == 0, run.output
    files = {"training_file": "file-r", "test_file": "file-t"}
    tasks = [{"name": "a", **files}, {"name": "b", **files}]
    assert service.bodies[-1][1] == {
        **body,
        "model": "other",
        "seeds": [4, 5],
        "tasks": tasks,
        "dry_run": False,
    }
    path.write_text(json.dumps({"name": "s", "search": {"space": {"reft.rank": [2, 4]}, "budget": 2}}))
    assert service.run("studies", "create", "--from", str(path), "--budget", "3").exit_code == 0
    assert service.bodies[-1][1]["search"] == {"space": {"reft.rank": [2, 4]}, "budget": 3}
    for text in ("[]", "no JSON"):
        path.write_text(text)
        assert service.run("studies", "create", "--from", str(path)).exit_code == 1


def test_reports_show_a_search_and_only_its_best_trial() -> None:
    trials = [
        {"number": 1, "params": {"reft.rank": 2}, "state": "complete", "value": 0.9, "reason": None},
        {
            "number": 2,
            "params": {"reft.rank": 4},
            "state": "failed",
            "value": None,
            "reason": "1 <failed> of 2",
        },
    ]
    arms = [
        {**an_arm(f"trial {one['number']}", accuracy=0.8 if one["value"] else None), "trial": one}
        for one in trials
    ]
    report = a_report(*arms, search={"best": {"arm": "trial 1", **trials[0]}})
    text = markdown(report)
    assert "Best on the validation rows: trial 1, 90.0 %." in text
    assert "| 1 | reft.rank = 2 | 90.0 % | complete |" in text
    assert "| 2 | reft.rank = 4 |  | failed: 1 \\<failed\\> of 2 |" in text
    assert text.count("| trial 1 | 80.0 % |") == 1
    assert "| trial 2 |" not in text
    shown = page(report)
    assert "<td>failed: 1 &lt;failed&gt; of 2</td>" in shown
    assert "Best on the validation rows: trial 1, 90.0 %." in shown


def test_reports_have_a_table_of_tasks_and_methods() -> None:
    arms = [
        {**an_arm(f"{method} on {task}", accuracy=accuracy), "method_name": method, "task": task}
        for task, accuracy in (("boolq", 0.8), ("sst2", None))
        for method in ("LoRA", "HEFT")
    ]
    tasks = [
        {"name": name, "training_file": f"file-{name}", "validation_file": "file-v", "test_file": None}
        for name in ("boolq", "sst2")
    ]
    over = [{"a": "LoRA", "b": "HEFT", "sentence": "On average over these 2 tasks, nobody knows."}]
    report = a_report(*arms, tasks=tasks, over_tasks=over, training_file=None, test_file=None)
    text = markdown(report)
    assert "| task | LoRA | HEFT |" in text
    assert "| boolq | 80.0 % (75.0 to 85.0 %) | 80.0 % (75.0 to 85.0 %) |" in text
    assert "| sst2 | 1: failed | 1: failed |" in text
    assert "- On average over these 2 tasks, nobody knows." in text
    assert "boolq: trained on file-boolq, evaluated on file-v" in text
    shown = page(report)
    assert "<th>HEFT</th>" in shown
    assert "<li>On average over these 2 tasks, nobody knows.</li>" in shown
