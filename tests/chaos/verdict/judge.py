"""Checks everything after the last fault: over HTTP as a client, in the tables, and in the stored files."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from clients.client_log import ClientLog
from clients.user import ENDED, JOBS, Client, GaveUp, fetch_model
from harness.chaos_stack import QUICK_SETTINGS, ChaosStack
from verdict import causes, invariants, resumes

from cli.stack.process import wait_until
from store.db.session import make_engine, session_factory
from store.storage import garbage


def judge(stack: ChaosStack, log: ClientLog) -> dict[str, Any]:
    stack.wait_until_ready()
    client = Client(stack.url, stack.key, log)
    # Jobs whose creation was never answered must end as well.
    _wait_for_all_jobs(stack, client, time.monotonic() + 120)
    ended, not_served = _check_models(stack, client, log)
    client.close()
    _collect_garbage(stack)
    books = invariants.Books.read(stack.database_url)
    for record in _fired(stack):
        log.write("fired", **record)
    entries = log.entries()
    violations = {
        "served": not_served,
        "one end": invariants.one_end(entries, books),
        "causes": causes.unexplained_failures(
            entries, books.jobs, books.attempts, max_deaths=int(QUICK_SETTINGS["HEFT_MAX_TRAINER_DEATHS"])
        ),
        "resumed": resumes.wrong_resumes(entries, books.attempts, books.checkpoints, books.events),
        "one success": invariants.one_success(entries, books),
        "stale writes": invariants.no_stale_write(books),
        "changed ends": invariants.ends_never_change(entries),
        "stored": invariants.stored(books, stack.artifacts),
        "answers": invariants.only_503(entries),
    }
    status = stack.stop()
    violations["left behind"] = stack.left_behind() + (
        [] if status == 0 else [f"heft up ended with {status}"]
    )
    return {
        "jobs": dict(Counter(job["status"] for job in ended)),
        "attempts": len(books.attempts),
        "outcomes": dict(Counter(row["outcome"] for row in books.attempts)),
        "resumed_after_damage": sum(
            event["data"].get("signature") == "damaged_checkpoint" for event in books.events
        ),
        "models_checked": len(books.models),
        "violations": {name: found for name, found in violations.items() if found},
    }


def _check_models(
    stack: ChaosStack, client: Client, log: ClientLog
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns all accepted jobs, and the violations in the models that are served."""
    until = time.monotonic() + 120
    expected = {entry["job"]: entry["expect"] for entry in log.entries() if entry["kind"] == "accepted"}
    ended = [client.get_job(job_id, until) for job_id in sorted(invariants.accepted(log.entries()))]
    manifests = {model["id"]: model["manifest"] for model in invariants.Books.read(stack.database_url).models}
    wrong, real_weights = [], set()
    for job in ended:
        model_id = job["fine_tuned_model"]
        if model_id is None:
            continue
        try:
            files = fetch_model(client, model_id, time.monotonic() + 120)
        except GaveUp as reason:
            wrong.append(str(reason))
            continue
        expect = expected.get(job["id"], {})
        wrong += [f"{job['id']}: {fault}" for fault in invariants.served(expect, files, manifests[model_id])]
        if expect.get("real"):
            real_weights.add(json.dumps(_weights(manifests[model_id]), sort_keys=True))
    if len(real_weights) > 1:
        wrong.append(f"{len(real_weights)} different results of the same training run")
    return ended, wrong


def _wait_for_all_jobs(stack: ChaosStack, client: Client, until: float) -> None:
    def all_ended() -> bool:
        stack.start()
        page = client.request("GET", JOBS, params={"limit": 100}, until=until).json()["data"]
        return all(job["status"] in ENDED for job in page)

    wait_until(all_ended, seconds=max(1.0, until - time.monotonic()))


def _weights(manifest: dict[str, str]) -> dict[str, str]:
    """Returns the hashes of the weights: other files contain times and paths."""
    return {name: sha256 for name, sha256 in manifest.items() if name.endswith(".safetensors")}


def _collect_garbage(stack: ChaosStack) -> None:
    """Runs the workers' garbage collection to its end: nothing is written any more."""
    engine = make_engine(stack.database_url, pool_size=1)
    try:
        factory = session_factory(engine)
        # A turn deletes at most a hundred of each kind.
        for _ in range(20 + len(invariants.Books.read(stack.database_url).attempts) // 100 * 2):
            garbage.collect(factory, stack.artifacts, quiet_seconds=0)
        garbage.collect_uploads(factory, stack.artifacts, quiet_seconds=0)
        garbage.collect_prepared(factory, stack.artifacts)
    finally:
        engine.dispose()


def points(stack: ChaosStack) -> dict[str, int]:
    return dict(Counter(record["point"] for record in _fired(stack)))


def _fired(stack: ChaosStack) -> list[dict[str, Any]]:
    """Returns the crash points at which processes killed or froze themselves."""
    path = stack.control / "fired.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
