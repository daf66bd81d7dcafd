"""STUDIES.md: every study as the service reports it, with what is said of it (<name>.words.md), behind words.md."""

from __future__ import annotations

import json
from pathlib import Path

from cli.render import duration


def write(target: Path, results: Path) -> None:
    parts = [(Path(__file__).parent / "words.md").read_text().strip()]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        text = path.with_suffix(".md").read_text().strip()
        heading, _, rest = text.partition("\n")
        # One level deeper than in a report of its own.
        deeper = "\n".join(f"#{line}" if line.startswith("#") else line for line in rest.splitlines())
        words = path.with_suffix(".words.md")
        parts += [
            f"#{heading}",
            f"    {found['command']}",
            f"Took {duration(found['seconds'])} in all.",
            *([words.read_text().strip()] if words.exists() else []),
            deeper.strip(),
        ]
    (target / "STUDIES.md").write_text("\n\n".join(parts) + "\n")
