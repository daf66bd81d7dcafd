"""The request for a study, from what was given on the command line. It does NOT know which settings there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.jobs import file_id, job_body, setting_value
from cli.errors import CommandError

if TYPE_CHECKING:
    from cli.client import Client, Json

FILES = ("training_file", "validation_file", "test_file")


def read(path: Path) -> Json:
    """A request that was written down. Raises CommandError."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise CommandError(f"--from {path}: {fault}") from None
    if not isinstance(body, dict):
        raise CommandError(f"--from {path}: this is no JSON object")
    return body


def upload_files(client: Client, body: Json) -> None:
    """Files of this machine become uploaded ones, those of the tasks too; each is sent once."""
    sent: dict[str, str] = {}
    tasks = body.get("tasks") or []
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise CommandError('"tasks" is a list of objects')
    for part in (body, *tasks):
        for field in FILES:
            if isinstance(reference := part.get(field), str):
                sent[reference] = sent.get(reference) or file_id(client, reference)
                part[field] = sent[reference]


def arms(arm: list[str], grid: list[str], *, method: str | None, settings: list[str]) -> Json:
    """What the options say of arms; the method is what a grid or a search varies."""
    found: Json = {}
    if method is not None or settings:
        found = job_body(model="", method=method or "heft", settings=settings)
        del found["model"]
    if arm:
        found["arms"] = [arm_body(text) for text in arm]
    if grid:
        found["grid"] = grid_body(grid)
    return found


def chosen(
    search: list[str], written: Json | None, *, budget: int | None, sampler: str | None, parallel: int | None
) -> Json:
    """A search, with its budget: of the options, or the one that was `written` down; else the budget is the grid's."""
    given = {"budget": budget, "sampler": sampler, "parallel": parallel}
    options = {name: value for name, value in given.items() if value is not None}
    if search:
        return {"search": {**(written or {}), "space": space_body(search), **options}}
    if written is not None:
        return {"search": {**written, **options}}
    if sampler is not None or parallel is not None:
        raise CommandError("--sampler and --parallel belong to --search")
    return options


def numbers(text: str) -> list[int]:
    """`"1,2,3"` → [1, 2, 3]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"--seeds takes numbers with commas between them, not {text!r}") from None


def arm_body(text: str) -> Json:
    """`"narrow: heft reft.rank=2"` as the request has it."""
    name, separator, rest = text.partition(":")
    kind, *settings = rest.split() or [""]
    if not separator or not name.strip() or not kind:
        raise CommandError(f"--arm takes 'NAME: METHOD NAME=VALUE …', not {text!r}")
    body = job_body(model="", method=kind, settings=settings)
    beyond = {field: value for field, value in body.items() if field not in ("model", "method")}
    return {"name": name.strip(), "method": body["method"], **({"set": beyond} if beyond else {})}


def grid_body(settings: list[str]) -> dict[str, list[Any]]:
    """`["reft.layers=10,15"]` → {"reft.layers": [10, 15]}; a JSON list works too."""
    found: dict[str, list[Any]] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not text:
            raise CommandError(f"--grid takes NAME=VALUE,VALUE, not {setting!r}")
        value = setting_value(text)
        found[name] = value if isinstance(value, list) else [setting_value(part) for part in text.split(",")]
    return found


def space_body(settings: list[str]) -> Json:
    """`["reft.rank=2,4", "reft.learning_rate=1e-5..1e-3:log"]`: lists of values, and ranges of numbers."""
    found: Json = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not text:
            raise CommandError(f"--search takes NAME=VALUE,VALUE or NAME=LOW..HIGH, not {setting!r}")
        low, dots, rest = text.partition("..")
        high, colon, scale = rest.partition(":")
        ends = [setting_value(end) for end in (low, high)]
        if not dots or not all(isinstance(end, int | float) for end in ends):
            found |= grid_body([setting])
        elif colon and scale != "log":
            raise CommandError(f"a range of --search may end in :log, not in :{scale}")
        else:
            found[name] = {"low": ends[0], "high": ends[1], **({"log": True} if colon else {})}
    return found
