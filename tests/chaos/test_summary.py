"""Parts add up, and nothing that was violated is left out."""

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
        "| jobs accepted, all ended | 6: succeeded 6 |",
        "| violations | 1 |",
        "- abc, seed 2: one end: ftjob-1 is not there",
    ):
        assert told in text
    assert text.count("| violations |") == 1
