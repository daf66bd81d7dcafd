"""The checks of `heft doctor`: every part of a running service, with advice on problems.

Connects to the servers as API and workers do, and reads the tables. Changes nothing, except for a small file in the
storage that is deleted again.
"""

from __future__ import annotations

from collections.abc import Iterator

from cli.doctor import servers
from cli.doctor.finding import Finding, State, ok, warning, wrong
from cli.doctor.gpu import gpu
from store.db.session import SessionFactory, make_engine, session_factory, transaction
from store.ops import diagnosis
from store.ops.diagnosis import Queue, SeenWorker, TroubledJob
from store.settings import StoreSettings

_ROLES = {
    "train": "no job is trained",
    "prepare": "jobs stay in validating_files, exports are not built",
    "inference": "/predict responds with 503",
}
_QUEUES = {"prepare": "validation", "train": "training"}
#: A job that waits this long beside an idle worker has been overlooked.
_MAX_WAIT_SECONDS = 300.0
_TROUBLES = {
    "lease_expired": (
        "{state}, but its lease expired {number:.0f} s ago",
        "a worker reclaims it at its next sweep: check that workers run, and their logs",
    ),
    "no_progress": (
        "no progress for {number:.0f} s",
        "its worker stops it after HEFT_STALL_SECONDS and logs the trainer's stacks",
    ),
    "trainer_dies": (
        "its trainer has crashed {number:.0f} times since its last checkpoint",
        "see the job's events; if it is out of memory, reduce max_length",
    ),
    "workers_lost": (
        "its worker was lost {number:.0f} times",
        "check the workers' machines: restarts, memory, network to the database",
    ),
    "files_left": (
        "ended, but its files are still on its worker's disk",
        "find out what holds the worker's scratch folder open",
    ),
}


def examine(settings: StoreSettings, api_url: str | None) -> Iterator[Finding]:
    """Runs all checks; skips those that depend on a part that does not work."""
    if api_url is not None:
        yield servers.api(api_url)
    engine = make_engine(settings.database_url, pool_size=1)
    try:
        sessions = session_factory(engine)
        database = servers.database(sessions)
        yield database
        if database.state is State.OK:
            tables = servers.tables(sessions)
            yield tables
            if tables.state is State.OK:
                yield from _workers_and_jobs(sessions, settings)
    finally:
        engine.dispose()
    yield servers.broker(settings)
    yield servers.storage(settings)
    yield from servers.disks(settings)
    yield gpu()


def _workers_and_jobs(sessions: SessionFactory, settings: StoreSettings) -> Iterator[Finding]:
    with transaction(sessions) as session:
        workers = diagnosis.seen_workers(session)
        since_sweep = diagnosis.seconds_since_sweep(session)
        queues = diagnosis.queues(session)
        troubled = diagnosis.troubled_jobs(session, stall_seconds=settings.stall_seconds)
    alive = [worker for worker in workers if worker.silent_seconds <= settings.lease_seconds]
    for role, consequence in _ROLES.items():
        yield _workers_of(role, [worker for worker in alive if worker.role == role], consequence)
    for worker in workers:
        if worker not in alive:
            yield _silent(worker)
    yield _reconciler(since_sweep, settings)
    for queue in queues:
        yield _queue(queue, idle=sum(worker.role == queue.purpose for worker in alive) > queue.claimed)
    yield from _jobs(troubled)


def _workers_of(role: str, alive: list[SeenWorker], consequence: str) -> Finding:
    name = f"{role} workers"
    if not alive:
        advice = f"start one: `heft worker {role}` (`heft up` runs one of each)"
        return wrong(name, f"none: {consequence}", advice)
    heartbeats = ", ".join(
        f"{worker.id} on {worker.host} {worker.silent_seconds:.0f} s ago" for worker in alive
    )
    return ok(name, f"{len(alive)} alive, last heartbeat: {heartbeats}")


def _silent(worker: SeenWorker) -> Finding:
    result = (
        f"{worker.id} on {worker.host} (process {worker.pid}): last heartbeat "
        f"{_span(worker.silent_seconds)} ago"
    )
    advice = "if it should run, see its log; its jobs have been reassigned, and a new worker reuses its name"
    return warning("silent worker", result, advice)


def _reconciler(since_sweep: float | None, settings: StoreSettings) -> Finding:
    name = "reconciler"
    if since_sweep is not None and since_sweep <= 4 * settings.sweep_seconds:
        return ok(name, f"last sweep {since_sweep:.0f} s ago")
    result = "has never run" if since_sweep is None else f"last sweep {_span(since_sweep)} ago"
    return wrong(name, result, "every worker runs it: start one, or search the workers' logs for `sweep`")


def _queue(queue: Queue, *, idle: bool) -> Finding:
    name = f"{_QUEUES[queue.purpose]} queue"
    if queue.length == 0:
        return ok(name, "empty")
    result = f"{queue.length} waiting, the first for {_span(queue.oldest_seconds)}"
    if idle and queue.oldest_seconds > _MAX_WAIT_SECONDS:
        advice = "a worker is idle but does not take the job: see its log, and check the broker"
        return wrong(name, result, advice)
    return ok(name, result)


def _jobs(troubled: list[TroubledJob]) -> Iterator[Finding]:
    if not troubled:
        yield ok("jobs", "none stuck")
    for job in troubled:
        template, advice = _TROUBLES[job.trouble]
        state = State.WRONG if job.trouble == "lease_expired" else State.WARNING
        result = f"{job.id}: {template.format(state=job.state, number=job.number)}"
        yield Finding(name="stuck job", state=state, found=result, advice=advice)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.0f} h"
