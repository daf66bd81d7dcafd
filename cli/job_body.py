"""The request for a job, made from command-line options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import CommandError

if TYPE_CHECKING:
    from cli.client import Client


def job_body(*, model: str, method: str, settings: list[str]) -> dict[str, Any]:
    """Returns the request's body. Settings of a stage (`lora.rank=8`) belong to the method, others to the job."""
    body: dict[str, Any] = {"model": model, "method": {"type": method}}
    stages: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise CommandError(f"--set must have the form NAME=VALUE, not {setting!r}")
        parent = stages if name.startswith(("lora.", "reft.")) else body
        *path, leaf = name.split(".")
        for key in path:
            parent = parent.setdefault(key, {})
        parent[leaf] = setting_value(text)
    if stages:
        # Methods with one stage have its settings without the stage's name.
        body["method"][method] = stages.get(method, stages) if method in ("lora", "reft") else stages
    return body


def setting_value(text: str) -> Any:
    """Parses JSON, and returns any other text (`auto`, `f1+l1`) as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def file_id(client: Client, reference: str) -> str:
    """Returns a reference as it is, and uploads a path first."""
    if reference.startswith(("file-", "hub:", "sample:")) and not Path(reference).exists():
        return reference
    return str(client.upload(Path(reference))["id"])
