"""After quiet: look at everything a last time, as a client, in the tables and in the stored bytes, and judge it.

It does NOT know what is a violation: `verdict`, `causes` and `resumed` do.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from clients.evidence import Evidence
from clients.user import ENDED, JOBS, Client, GaveUp, fetch_model
from harness.chaos_stack import PATIENCE, ChaosStack
from verdict import causes, invariants, resumed

from cli.stack.process import wait_until
from store.db.session import make_engine, session_factory
from store.storage import garbage


def judge(stack: ChaosStack, log: Evidence) -> dict[str, Any]:
    stack.wait_until_ready()
    client = Client(stack.url, stack.key, log)
    # Jobs that somebody made without learning of it end as well; they come last.
    _wait_for_stragglers(stack, client, time.monotonic() + 120)
    ended, not_served = _look_at_all(stack, client, log)
    client.close()
    _collect_garbage(stack)
    books = invariants.Books.read(stack.database_url)
    for record in _fired(stack):
        log.write("fired", **record)
    entries = log.entries()
    violations = {
        "served": not_served,
        "one end": invariants.one_end(entries, books),
        "causes": causes.unfounded(
            entries, books.jobs, books.attempts, max_deaths=int(PATIENCE["HEFT_MAX_TRAINER_DEATHS"])
        ),
        "resumed": resumed.wrongly(entries, books.attempts, books.checkpoints, books.events),
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


def _look_at_all(stack: ChaosStack, client: Client, log: Evidence) -> tuple[list[dict[str, Any]], list[str]]:
    """Every accepted job as it is shown now; and what is wrong with the models that are served."""
    until = time.monotonic() + 120
    expected = {entry["job"]: entry["expect"] for entry in log.entries() if entry["kind"] == "accepted"}
    ended = [client.look(job_id, until) for job_id in sorted(invariants.accepted(log.entries()))]
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


def _wait_for_stragglers(stack: ChaosStack, client: Client, until: float) -> None:
    def all_ended() -> bool:
        stack.start()
        page = client.insist("GET", JOBS, params={"limit": 100}, until=until).json()["data"]
        return all(job["status"] in ENDED for job in page)

    wait_until(all_ended, seconds=max(1.0, until - time.monotonic()))


def _weights(manifest: dict[str, str]) -> dict[str, str]:
    """Without the files that tell of the way: times, paths and the like."""
    return {name: sha256 for name, sha256 in manifest.items() if name.endswith(".safetensors")}


def _collect_garbage(stack: ChaosStack) -> None:
    """What the workers do in the background, all of it now: nothing is being written any more."""
    engine = make_engine(stack.database_url, pool_size=1)
    try:
        factory = session_factory(engine)
        # At most a hundred of each kind a turn.
        for _ in range(20 + len(invariants.Books.read(stack.database_url).attempts) // 100 * 2):
            garbage.collect(factory, stack.artifacts, quiet_seconds=0)
        garbage.collect_uploads(factory, stack.artifacts, quiet_seconds=0)
        garbage.collect_prepared(factory, stack.artifacts)
    finally:
        engine.dispose()


def points(stack: ChaosStack) -> dict[str, int]:
    return dict(Counter(record["point"] for record in _fired(stack)))


def _fired(stack: ChaosStack) -> list[dict[str, Any]]:
    """What processes under test did to themselves at crash points."""
    path = stack.control / "fired.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
