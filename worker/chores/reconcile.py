"""The reconciler's legs: every worker looks now and then for what was lost, and sends it on its way again.

What is lost and what is to be done about it is decided in `store.jobs.reconcile`, one process at a time; what
nobody needs any more is deleted by `store.storage.garbage`. It does NOT run jobs.
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


def sweep(context: Context) -> None:
    """Take back what lost workers held; send hints for what waits unheard. Raises Unavailable."""
    settings = context.settings
    with transaction(context.sessions) as session:
        # Enough for everyone who may be idle; hints that nobody hears would pile up for hours.
        limit = 1 + 2 * len(workers.list_workers(session))
        waiting = reconcile.sweep(
            session,
            lease_seconds=settings.lease_seconds,
            grace_seconds=settings.lease_grace_seconds,
            stale_seconds=settings.sweep_seconds,
            max_lost_leases=settings.max_lost_leases,
            limit=limit,
        )
        archives = exports.waiting(session, limit=limit)
    for job_id, purpose in waiting:
        context.hints.hint(job_id, purpose)
    for model_id, export_format in archives:
        context.hints.export(model_id, export_format)


def collect(context: Context) -> None:
    """Delete what rows have given up or attempts have left. Raises Unavailable."""
    settings = context.settings
    with transaction(context.sessions) as session:
        stage_results.expire(session, days=settings.reuse_days, max_bytes=settings.reuse_bytes)
    garbage.collect(context.sessions, context.artifacts)


def collect_listed(context: Context) -> None:
    """Delete what only a listing of the storage can find, and keys of requests long past. Raises Unavailable."""
    with transaction(context.sessions) as session:
        idempotency.forget_old(session)
    garbage.collect_uploads(context.sessions, context.artifacts)
    garbage.collect_archives(context.sessions, context.artifacts)
    garbage.collect_prepared(context.sessions, context.artifacts)


def reconcile_chores(context: Context) -> list[Chore]:
    return [
        Chore(name="sweep", seconds=context.settings.sweep_seconds, do=lambda: sweep(context)),
        Chore(name="garbage", seconds=_GARBAGE_SECONDS, do=lambda: collect(context)),
        Chore(name="listed garbage", seconds=_LISTING_SECONDS, do=lambda: collect_listed(context)),
    ]
