"""Sums up all results and writes them into docs/reliability.md, between its two marks: `make chaos-summary`.

Campaigns with violations are counted with the others, and their violations are listed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- results: written by `make chaos-summary` -->", "<!-- end of results -->"

#: Violations of one kind in one campaign that are listed; the others are counted.
_LISTED = 1
_MAX_CHARACTERS = 150

Result = dict[str, Any]


def read(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def added(results: list[Result], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result[name])
    return total


def campaigns(results: list[Result]) -> list[str]:
    if not results:
        return ["No campaign has been run yet."]
    kills, jobs = added(results, "kills"), added(results, "jobs")
    hours = sum(result["seconds"] for result in results) / 3600
    rows = [
        ("parts, hours", f"{len(results)}, {hours:.1f}"),
        ("kills", f"{kills.total():,}: " + _listed(kills)),
        ("of these at named points", f"{added(results, 'points').total():,}"),
        ("other faults", _listed(_others(added(results, "faults")))),
        ("requests; unanswered; refused with 503", _requests(results)),
        ("jobs accepted, as they were seen last", f"{jobs.total():,}: " + _listed(jobs)),
        ("attempts at them", f"{sum(result['attempts'] for result in results):,}"),
        (
            "resumed past a damaged checkpoint",
            f"{sum(result['resumed_after_damage'] for result in results):,}",
        ),
        ("models compared byte for byte", f"{sum(result['models_checked'] for result in results):,}"),
        ("parts in which nothing was violated", _clean(results)),
        ("violations", f"{sum(len(found) for result in results for found in result['violations'].values())}"),
    ]
    return [
        "| campaign | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        *_violations(results),
    ]


def _others(faults: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in faults.items() if not name.startswith("kill ") and count})


def _requests(results: list[Result]) -> str:
    return "; ".join(
        f"{sum(result[name] for result in results):,}" for name in ("requests", "unanswered", "refused_503")
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _violations(results: list[Result]) -> list[str]:
    lines = []
    for result in results:
        for name, found in result["violations"].items():
            place = f"- {result['commit']}, seed {result['seed']}: {name}: "
            lines += [place + _short(one) for one in found[:_LISTED]]
            if len(found) > _LISTED:
                lines.append(f"{place}{len(found) - _LISTED} more")
    return ["", "What was violated:", "", *lines] if lines else []


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"


def _clean(results: list[Result]) -> str:
    clean = [result for result in results if not result["violations"]]
    return f"{len(clean)}, with {added(clean, 'kills').total():,} kills"


def resumes(results: list[Result]) -> list[str]:
    if not results:
        return []
    # All parts of the newest commit.
    parts = [result for result in results if result.get("commit") == results[-1].get("commit")]
    differ, seeds = added(parts, "differ"), sum(part["seeds"] for part in parts)
    stages = parts[0]["differ"]
    loaded, tried = added(parts, "damaged_loaded"), sum(part["damaged"] for part in parts)
    bfloat16 = sum(part["bfloat16_seeds"] for part in parts)
    largest = max(part["bfloat16_largest_difference"] for part in parts)
    rows = [
        *((f"interrupted in {one}, {seeds} seeds: runs that differ by a bit", differ[one]) for one in stages),
        (f"bfloat16, {bfloat16} seeds: largest difference of a loss", f"{largest:.1e}"),
        (f"damaged checkpoints taken for whole, of {tried}", loaded.total()),
    ]
    return ["", "| resume | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def figures(results: list[Result]) -> list[str]:
    lines: list[str] = []
    latest: dict[str, Result] = {}
    for result in results:  # one run may have measured some of them only
        latest.setdefault(result["settings"], {}).update(result)
    for last in latest.values():
        told = (f"| {name} | {tell(last[key])} |" for key, (name, tell) in _FIGURES.items() if key in last)
        heading = f"| with settings {last['settings']} (lease {last['lease_s']:g} s) | |"
        lines += ["", heading, "| --- | --- |", *told]
    return lines


def _seconds(found: Result) -> str:
    return f"{found['median']} s; longest of {found['n']}: {found['longest']} s"


def _posts(found: Result) -> str:
    return f"{found['answered']:.0%} answered, p99 {found['p99_ms']} ms"


def _without_postgres(found: Result) -> str:
    answers = ", ".join(f"{count} × {status}" for status, count in found["answers"].items())
    return f"{answers}, within {found['slowest_s']} s; well {found['well_after_s']} s after"


_FIGURES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "worker_killed_running_again_s": ("worker killed and started again: its job trains again", _seconds),
    "worker_gone_running_again_s": ("worker gone for good: its job trains again elsewhere", _seconds),
    "cancel_processes_gone_s": ("cancel of a running job: its processes are gone", _seconds),
    "posts_broker_frozen": ("POST while the broker is frozen", _posts),
    "posts_broker_killed": ("POST while the broker is killed", _posts),
    "postgres_frozen": ("while Postgres is frozen", _without_postgres),
}


def main() -> int:
    lines = [
        *campaigns(read(RESULTS / "campaigns.jsonl")),
        *resumes(read(RESULTS / "resume.jsonl")),
        *figures(read(RESULTS / "figures.jsonl")),
    ]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text("\n".join([before.rstrip("\n"), "", BEGIN, "", *lines, "", END]) + after)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
