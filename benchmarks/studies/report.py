"""STUDIES.md: every study as the service reports it, with what is said of it (<name>.words.md), behind words.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.render import duration

#: More sentences than these are told by the ones that say a difference.
_MOST_SENTENCES = 12


def write(target: Path, results: Path) -> None:
    parts = [(Path(__file__).parent / "words.md").read_text().strip()]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        text = path.with_suffix(".md").read_text().strip()
        heading, _, rest = text.partition("\n")
        arms, _, _ = rest.partition("\n## Verdict")
        # One level deeper than in a report of its own.
        deeper = "\n".join(f"#{line}" if line.startswith("#") else line for line in arms.splitlines())
        words = path.with_suffix(".words.md")
        parts += [
            f"#{heading}",
            f"    {found['command']}",
            f"Took {duration(found['seconds'])} in all.",
            *([words.read_text().strip()] if words.exists() else []),
            deeper.strip(),
            "### Verdict",
            _verdict(found["study"]["comparisons"]),
            f"Every pair, and single models one by one: [{path.stem}](studies/results/{path.stem}.md).",
        ]
    (target / "STUDIES.md").write_text("\n\n".join(parts) + "\n")


def _verdict(comparisons: list[dict[str, Any]]) -> str:
    shown = comparisons
    lines = []
    if len(comparisons) > _MOST_SENTENCES:
        shown = [one for one in comparisons if one["separable"]]
        lines = [f"- Of {len(comparisons)} pairs {len(shown) or 'none'} can be told apart."]
    return "\n".join([*lines, *(f"- {one['sentence']}" for one in shown)])
