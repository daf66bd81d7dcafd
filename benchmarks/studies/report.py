"""STUDIES.md: words.md, then the service's report of every study with its discussion (<name>.words.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.render import duration

#: With more comparisons than this, only significant ones are listed.
_MAX_SENTENCES = 12


def write(target: Path, results: Path) -> None:
    parts = [(Path(__file__).parent / "words.md").read_text().strip()]
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        text = path.with_suffix(".md").read_text().strip()
        heading, _, rest = text.partition("\n")
        arms, _, _ = rest.partition("\n## Comparisons")
        # Headings are one level deeper than in the report.
        deeper = "\n".join(f"#{line}" if line.startswith("#") else line for line in arms.splitlines())
        words = path.with_suffix(".words.md")
        parts += [
            f"#{heading}",
            f"    {result['command']}",
            _took(result),
            *([words.read_text().strip()] if words.exists() else []),
            deeper.strip(),
            "### Comparisons",
            _sentences(result["study"]["comparisons"]),
            f"All pairs of methods and of single models: [{path.stem}](studies/results/{path.stem}.md).",
        ]
    (target / "STUDIES.md").write_text("\n\n".join(parts) + "\n")


def _took(result: dict[str, Any]) -> str:
    # The first studies did not record their processor.
    machine = f", on {result['processor']}" if "processor" in result else ""
    return f"Took {duration(result['seconds'])} in total{machine}."


def _sentences(comparisons: list[dict[str, Any]]) -> str:
    listed = comparisons
    lines = []
    if len(comparisons) > _MAX_SENTENCES:
        listed = [comparison for comparison in comparisons if comparison["separable"]]
        lines = [f"- {len(listed) or 'None'} of the {len(comparisons)} differences are significant."]
    return "\n".join([*lines, *(f"- {comparison['sentence']}" for comparison in listed)])
