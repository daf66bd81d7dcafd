"""Judging studies: when jobs of a study have ended, the verdict over its arms is made anew and written down.

A chore of the workers that check files. The numbers are computed by a child (`python -m heft_engine judge`), because
statsmodels and pandas would stay in this process for good, and the API shall start without them. It does NOT know
statistics.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from store import studies, verdicts
from store.database import transaction
from worker.background import Chore
from worker.child import child_environment
from worker.context import ENGINE, Context

log = logging.getLogger(__name__)

_SECONDS = 120.0


def judge_studies(context: Context, command: Sequence[str] = ENGINE) -> None:
    """Judge every study with news. Raises Unavailable."""
    failed: set[str] = set()
    while not context.stopping.is_set() and _judge_one(context, command, failed):
        pass


def _judge_one(context: Context, command: Sequence[str], failed: set[str]) -> bool:
    """False when there is nothing (more) to judge just now. No transaction is open while it is computed.

    A study that can't be judged joins `failed`, so that it does not stand before the others.
    """
    with transaction(context.sessions) as session:
        study = verdicts.with_news(session, but=failed)
        runs = studies.runs_of(session, study.id) if study is not None else []
    if study is None:
        return False
    try:
        verdict = _verdict(context, command, verdicts.question(study, runs))
    except (subprocess.SubprocessError, ValueError) as fault:
        # Nothing was written down: the next sweep tries again.
        said = getattr(fault, "stderr", None) or b""
        log.error(
            "study %s could not be judged: %s %s", study.id, fault, said[-500:].decode(errors="replace")
        )
        failed.add(study.id)
        return True
    with transaction(context.sessions) as session:
        verdicts.record(session, study.id, runs, verdict)
    return True


def _verdict(context: Context, command: Sequence[str], question: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="judge-", dir=context.scratch) as folder:
        path = Path(folder) / "question.json"
        path.write_text(json.dumps(question))
        done = subprocess.run(
            [*command, "judge", "--run-file", str(path)],
            env=child_environment(os.environ),
            cwd=folder,
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict


def judging(context: Context) -> list[Chore]:
    seconds = context.settings.sweep_seconds
    return [Chore(name="judge studies", seconds=seconds, do=lambda: judge_studies(context))]
