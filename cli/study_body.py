"""The request for a study, made from command-line options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import CommandError
from cli.job_body import file_id, job_body, setting_value

if TYPE_CHECKING:
    from cli.client import Client, Json

FILES = ("training_file", "validation_file", "test_file")


def read(path: Path) -> Json:
    """Reads a request from a JSON file. Raises CommandError."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise CommandError(f"--from {path}: {fault}") from None
    if not isinstance(body, dict):
        raise CommandError(f"--from {path}: must be a JSON object")
    return body


def upload_files(client: Client, body: Json) -> None:
    """Uploads local files, also those of tasks, and replaces their paths by file ids. Each file is uploaded once."""
    ids: dict[str, str] = {}
    tasks = body.get("tasks") or []
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise CommandError('"tasks" must be a list of objects')
    for part in (body, *tasks):
        for field in FILES:
            if isinstance(reference := part.get(field), str):
                ids[reference] = ids.get(reference) or file_id(client, reference)
                part[field] = ids[reference]


def arms(arm: list[str], grid: list[str], *, method: str | None, settings: list[str]) -> Json:
    """Returns the fields of arms, of a grid, and of the method that a grid or a search varies."""
    body: Json = {}
    if method is not None or settings:
        body = job_body(model="", method=method or "heft", settings=settings)
        del body["model"]
    if arm:
        body["arms"] = [arm_body(text) for text in arm]
    if grid:
        body["grid"] = grid_body(grid)
    return body


def search_or_budget(
    search: list[str],
    from_file: Json | None,
    *,
    budget: int | None,
    sampler: str | None,
    parallel: int | None,
) -> Json:
    """Returns the search of the options or of the request file; without a search, a grid's budget."""
    values = {"budget": budget, "sampler": sampler, "parallel": parallel}
    options = {name: value for name, value in values.items() if value is not None}
    if search:
        return {"search": {**(from_file or {}), "space": space_body(search), **options}}
    if from_file is not None:
        return {"search": {**from_file, **options}}
    if sampler is not None or parallel is not None:
        raise CommandError("--sampler and --parallel need --search")
    return options


def parse_seeds(text: str) -> list[int]:
    """`"1,2,3"` → [1, 2, 3]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"--seeds must be numbers separated by commas, not {text!r}") from None


def arm_body(text: str) -> Json:
    """Parses `"narrow: heft reft.rank=2"`."""
    name, separator, rest = text.partition(":")
    method, *settings = rest.split() or [""]
    if not separator or not name.strip() or not method:
        raise CommandError(f"--arm must have the form 'NAME: METHOD NAME=VALUE …', not {text!r}")
    body = job_body(model="", method=method, settings=settings)
    job_settings = {field: value for field, value in body.items() if field not in ("model", "method")}
    arm: Json = {"name": name.strip(), "method": body["method"]}
    return arm | ({"set": job_settings} if job_settings else {})


def grid_body(settings: list[str]) -> dict[str, list[Any]]:
    """`["reft.layers=10,15"]` → {"reft.layers": [10, 15]}. Values may be a JSON list."""
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not text:
            raise CommandError(f"--grid must have the form NAME=VALUE,VALUE, not {setting!r}")
        value = setting_value(text)
        grid[name] = value if isinstance(value, list) else [setting_value(part) for part in text.split(",")]
    return grid


def space_body(settings: list[str]) -> Json:
    """Parses lists of values, `reft.rank=2,4`, and ranges, `reft.learning_rate=1e-5..1e-3:log`."""
    space: Json = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not text:
            raise CommandError(
                f"--search must have the form NAME=VALUE,VALUE or NAME=LOW..HIGH, not {setting!r}"
            )
        low, dots, rest = text.partition("..")
        high, colon, scale = rest.partition(":")
        ends = [setting_value(end) for end in (low, high)]
        if not dots or not all(isinstance(end, int | float) for end in ends):
            space |= grid_body([setting])
        elif colon and scale != "log":
            raise CommandError(f"a range in --search can end in :log, not in :{scale}")
        else:
            space[name] = {"low": ends[0], "high": ends[1], **({"log": True} if colon else {})}
    return space
