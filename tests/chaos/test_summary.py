"""Campaigns add up, and no violation is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import summary


def part(seed: int, **changes: object) -> dict[str, object]:
    found = {
        "commit": "abc", "seed": seed, "seconds": 1800, "kills": {"api": 2, "up": 1}, "points": {"before commit": 1},
        "faults": {"kill api": 2, "disk full": 1}, "requests": 10, "unanswered": 2, "refused_503": 1,
        "jobs": {"succeeded": 3}, "attempts": 5, "resumed_after_damage": 1, "models_checked": 6, "violations": {},
    }  # fmt: skip
    return found | changes


def test_parts_add_up_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{summary.BEGIN}\nold\n{summary.END}\n\nafter\n")
    parts = [part(1), part(2, violations={"one end": ["ftjob-1 is not there"]})]
    (tmp_path / "campaigns.jsonl").write_text("".join(json.dumps(one) + "\n" for one in parts))
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "PAGE", page)
    summary.main()
    summary.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{summary.END}\n\nafter\n")
    assert "old" not in text
    for told in (
        "| parts, hours | 2, 1.0 |",
        "| kills | 6: api 4, up 2 |",
        "| other faults | disk full 2 |",
        "| jobs accepted, as they were seen last | 6: succeeded 6 |",
        "| parts in which nothing was violated | 1, with 3 kills |",
        "| violations | 1 |",
        "- abc, seed 2: one end: ftjob-1 is not there",
    ):
        assert told in text
    assert text.count("| violations |") == 1


def test_figures_measured_apart_stand_together_and_the_newest_counts() -> None:
    settings = {"settings": "of the service", "lease_s": 60.0}
    posts = {"answered": 1.0, "p99_ms": 300.0}
    lines = summary.figures(
        [
            {**settings, "posts_broker_frozen": {**posts, "p99_ms": 900.0}},
            {**settings, "cancel_processes_gone_s": {"n": 5, "median": 1.0, "longest": 2.0}},
            {**settings, "posts_broker_frozen": posts},
        ]
    )
    assert lines[1] == "| with settings of the service (lease 60 s) | |"
    assert lines[3:] == [
        "| cancel of a running job: its processes are gone | 1.0 s; longest of 5: 2.0 s |",
        "| POST while the broker is frozen | 100% answered, p99 300.0 ms |",
    ]


def test_of_many_violations_of_a_kind_the_first_is_told_and_the_rest_counted() -> None:
    found = summary.campaigns([part(1, violations={"stored": [f"file {n} " + 200 * "x" for n in range(10)]})])
    assert "| violations | 10 |" in found
    assert found[-1] == "- abc, seed 1: stored: 9 more"
    assert len(found[-2]) < 200
    assert sum(line.startswith("- abc") for line in found) == 2


def test_resumes_of_the_newest_commit_add_up() -> None:
    part = {
        "commit": "b", "seeds": 25, "differ": {"lora": 0, "reft": 1}, "bfloat16_seeds": 5,
        "bfloat16_largest_difference": 0.0, "damaged": 100, "damaged_loaded": {"engine": 0, "storage": 2},
    }  # fmt: skip
    lines = summary.resumes([{**part, "commit": "a", "differ": {"lora": 9, "reft": 9}}, part, part])
    assert lines[3:] == [
        "| interrupted in lora, 50 seeds: runs that differ by a bit | 0 |",
        "| interrupted in reft, 50 seeds: runs that differ by a bit | 2 |",
        "| bfloat16, 10 seeds: largest difference of a loss | 0.0e+00 |",
        "| damaged checkpoints taken for whole, of 200 | 4 |",
    ]
