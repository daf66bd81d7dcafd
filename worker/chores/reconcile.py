"""The reconciler's schedule: every worker recovers lost jobs and deletes what nobody needs any more.

`store.jobs.reconcile` decides what is lost and what is done about it, one process at a time; `store.storage.garbage`
decides what is deleted.
"""

from __future__ import annotations

from store import exports, idempotency
from store.db.session import transaction
from store.jobs import reconcile, stage_results
from store.ops import workers
from store.storage import garbage
from worker.chores.chore import Chore
from worker.context import Context

_GARBAGE_SECONDS = 120.0
_LISTING_SECONDS = 3_600.0


def recover_lost(context: Context) -> None:
    """Takes back jobs whose lease has expired, and sends hints again for waiting jobs and exports.

    Raises Unavailable.
    """
    settings = context.settings
    with transaction(context.sessions) as session:
        # Enough for all workers that may be idle; hints that nobody takes would pile up for hours.
        limit = 1 + 2 * len(workers.list_workers(session))
        waiting_jobs = reconcile.sweep(
            session,
            lease_seconds=settings.lease_seconds,
            grace_seconds=settings.lease_grace_seconds,
            stale_seconds=settings.sweep_seconds,
            max_lost_leases=settings.max_lost_leases,
            limit=limit,
        )
        waiting_exports = exports.waiting(session, limit=limit)
    for job_id, purpose in waiting_jobs:
        context.hints.hint(job_id, purpose)
    for model_id, export_format in waiting_exports:
        context.hints.export(model_id, export_format)


def collect_garbage(context: Context) -> None:
    """Deletes files whose rows were removed, and those that earlier attempts have left. Raises Unavailable."""
    settings = context.settings
    with transaction(context.sessions) as session:
        stage_results.expire(session, days=settings.reuse_days, max_bytes=settings.reuse_bytes)
    garbage.collect(context.sessions, context.artifacts)


def collect_unlisted(context: Context) -> None:
    """Deletes files without a row, which only a listing of the storage finds, and old idempotency keys.

    Raises Unavailable.
    """
    with transaction(context.sessions) as session:
        idempotency.delete_old(session)
    garbage.collect_uploads(context.sessions, context.artifacts)
    garbage.collect_archives(context.sessions, context.artifacts)
    garbage.collect_prepared(context.sessions, context.artifacts)


def reconcile_chores(context: Context) -> list[Chore]:
    return [
        Chore(
            name="recover lost jobs",
            seconds=context.settings.sweep_seconds,
            run=lambda: recover_lost(context),
        ),
        Chore(name="collect garbage", seconds=_GARBAGE_SECONDS, run=lambda: collect_garbage(context)),
        Chore(name="collect unlisted files", seconds=_LISTING_SECONDS, run=lambda: collect_unlisted(context)),
    ]
