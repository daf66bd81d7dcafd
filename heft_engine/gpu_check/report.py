"""The check's report in Markdown, to be pasted as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from heft_engine.gpu_check.part import Part


def markdown(results: Sequence[dict[str, Any]], parts: Sequence[Part], command: str) -> str:
    """Returns the report of the parts' results. command: that made them."""
    titles = {part.name: part.title for part in parts}
    lines = [
        f"# GPU check: {_gpu(results)}",
        "",
        f"`{command}`",
        "",
        "| part | result | seconds |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {titles[r['part']]} | {r['status']} | {r['seconds']} |" for r in results]
    for result in results:
        lines += ["", f"## {titles[result['part']]}", ""]
        lines += [f"- **failed**: {failure}" for failure in result["failures"]]
        if result.get("error"):
            lines += ["```", result["error"], "```"]
        lines += [f"- {name}: {_value(value)}" for name, value in result["figures"].items()]
    return "\n".join(lines) + "\n"


def gpu_name(results: Sequence[dict[str, Any]]) -> str | None:
    """Returns the GPU's name, if the part `machine` has told it."""
    for result in results:
        if "gpu" in result["figures"]:
            return str(result["figures"]["gpu"]["name"])
    return None


def _gpu(results: Sequence[dict[str, Any]]) -> str:
    return gpu_name(results) or "no GPU"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"
