"""Progress of a job on a terminal: a bar with stage, loss and remaining time, and a line for each event.

Polls instead of streaming, so that it survives a restart of the service.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cli.client import Client, Json
from cli.render import duration

_PERIOD_SECONDS = 1.0
_NOT_ACTIVE = ("succeeded", "failed", "cancelled", "paused")
_COLOURS = {"warn": "yellow", "error": "red"}


def watch_job(client: Client, job_id: str, console: Console | None = None) -> Json:
    """Shows a job until it ends or is paused, and returns its job object."""
    console = console or Console(highlight=False)
    path = f"/v1/fine_tuning/jobs/{job_id}"
    seen: set[str] = set()
    with Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[detail]}"),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=100, detail="")
        while True:
            job = client.get_with_retries(path)
            # After the job, so that the events that ended it are among them.
            for event in _new_events(client, path, seen):
                if event["data"]["code"] != "METRICS":
                    colour = _COLOURS.get(event["level"])
                    console.print(event["message"], style=colour, markup=False, soft_wrap=True)
            _update(progress, bar, job)
            if job["status"] in _NOT_ACTIVE:
                return job
            time.sleep(_PERIOD_SECONDS)


def _new_events(client: Client, path: str, seen: set[str]) -> Iterator[Json]:
    """Yields events that are not in `seen`, oldest first, and adds them."""
    new: list[Json] = []
    after: dict[str, str] = {}
    while True:
        page = client.get_with_retries(f"{path}/events", {"limit": 100, **after})
        unseen = [event for event in page["data"] if event["id"] not in seen]
        new += unseen
        if not page["has_more"] or len(unseen) < len(page["data"]):
            break
        after = {"after": page["data"][-1]["id"]}
    seen.update(event["id"] for event in new)
    yield from reversed(new)


def _update(progress: Progress, bar: TaskID, job: Json) -> None:
    state: Json = job.get("progress") or {}
    parts = []
    if state.get("total_steps"):
        parts.append(f"step {state.get('step', 0)}/{state['total_steps']}")
    loss = _loss(job)
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if state.get("eta_seconds") is not None:
        parts.append(f"{duration(state['eta_seconds'])} left")
    progress.update(
        bar,
        description=job.get("stage") or job["status"],
        completed=state.get("percent") or 0,
        detail="  ".join(parts),
    )


def _loss(job: Json) -> float | None:
    """The last loss of the running stage."""
    metrics: dict[str, Any] = job.get("metrics") or {}
    latest = metrics.get(job.get("stage") or "")
    loss = latest.get("loss") if isinstance(latest, dict) else None
    return float(loss) if loss is not None else None
