"""What `heft doctor` looks at: every part of a running service, and what to do where one is not well.

It asks the servers themselves, as the API and the workers do, and reads their tables. It does NOT change anything
but for one small file in the storage, which it takes away again.
"""

from __future__ import annotations

from collections.abc import Iterator

from cli.doctor import servers as servers
from cli.doctor.finding import Finding, State, ok, warning, wrong
from store.db.session import SessionFactory, make_engine, session_factory, transaction
from store.ops import diagnosis
from store.ops.diagnosis import Queue, SeenWorker, TroubledJob
from store.settings import StoreSettings

_ROLES = {
    "train": "nothing is trained",
    "prepare": "no job gets past validating_files, no export is built",
    "inference": "/predict answers 503",
}
_WORK = {"prepare": "files to be checked", "train": "training"}
#: A job that waits so long although a worker has nothing to do is not found by it.
_WAITS_SECONDS = 300.0
_TROUBLES = {
    "lease_expired": (
        "{state}, and its lease ran out {number:.0f} s ago",
        "a worker takes it back at its next sweep: look whether any worker runs, and at its log",
    ),
    "no_progress": (
        "said nothing for {number:.0f} s",
        "its worker ends it after HEFT_STALL_SECONDS and writes the trainer's stacks into its log",
    ),
    "trainer_dies": (
        "its trainer has died {number:.0f} times since its last checkpoint",
        "the job's events say how; out of memory: a smaller max_length",
    ),
    "workers_lost": (
        "its worker was lost {number:.0f} times",
        "look at the workers' machines: restarts, memory, network to the database",
    ),
    "files_left": (
        "ended; files of it stay on its worker's disk",
        "free what holds the worker's scratch folder",
    ),
}


def examine(settings: StoreSettings, api_url: str | None) -> Iterator[Finding]:
    """Look at everything, one after the other; what a missing part makes impossible is left out."""
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
                yield from _books(sessions, settings)
    finally:
        engine.dispose()
    yield servers.broker(settings)
    yield servers.storage(settings)
    yield from servers.disks(settings)


def _books(sessions: SessionFactory, settings: StoreSettings) -> Iterator[Finding]:
    with transaction(sessions) as session:
        workers = diagnosis.seen_workers(session)
        swept = diagnosis.seconds_since_sweep(session)
        queues = diagnosis.queues(session)
        troubled = diagnosis.troubled_jobs(session, stall_seconds=settings.stall_seconds)
    alive = [worker for worker in workers if worker.silent_seconds <= settings.lease_seconds]
    for role, without in _ROLES.items():
        yield _workers_of(role, [worker for worker in alive if worker.role == role], without)
    for worker in workers:
        if worker not in alive:
            yield _silent(worker)
    yield _reconciler(swept, settings)
    for queue in queues:
        yield _queue(queue, idle=sum(worker.role == queue.purpose for worker in alive) > queue.claimed)
    yield from _jobs(troubled)


def _workers_of(role: str, alive: list[SeenWorker], without: str) -> Finding:
    name = f"{role} workers"
    if not alive:
        return wrong(
            name, f"none: {without}", f"start one: `heft worker {role}` (`heft up` runs one of each)"
        )
    told = ", ".join(f"{worker.id} on {worker.host} {worker.silent_seconds:.0f} s ago" for worker in alive)
    return ok(name, f"{len(alive)} alive, last heard of: {told}")


def _silent(worker: SeenWorker) -> Finding:
    found = f"{worker.id} on {worker.host} (process {worker.pid}) was last heard of {_span(worker.silent_seconds)} ago"
    advice = (
        "if it should run, look at its log; its jobs have been handed on, and a new one takes its name over"
    )
    return warning("silent worker", found, advice)


def _reconciler(swept: float | None, settings: StoreSettings) -> Finding:
    name = "reconciler"
    if swept is not None and swept <= 4 * settings.sweep_seconds:
        return ok(name, f"looked for lost jobs {swept:.0f} s ago")
    found = (
        "nobody has ever looked for lost jobs" if swept is None else f"the last look was {_span(swept)} ago"
    )
    return wrong(name, found, "every worker does it: start one, or look at the workers' logs for `sweep`")


def _queue(queue: Queue, *, idle: bool) -> Finding:
    name = f"queue for {_WORK[queue.purpose]}"
    if queue.length == 0:
        return ok(name, "nothing waits")
    found = f"{queue.length} wait, the first for {_span(queue.oldest_seconds)}"
    if idle and queue.oldest_seconds > _WAITS_SECONDS:
        advice = "a worker is idle, and does not hear of it: look at its log, and whether the broker answers"
        return wrong(name, found, advice)
    return ok(name, found)


def _jobs(troubled: list[TroubledJob]) -> Iterator[Finding]:
    if not troubled:
        yield ok("jobs", "none is stuck")
    for job in troubled:
        found, advice = _TROUBLES[job.trouble]
        state = State.WRONG if job.trouble == "lease_expired" else State.WARNING
        found = f"{job.id}: {found.format(state=job.state, number=job.number)}"
        yield Finding(name="stuck job", state=state, found=found, advice=advice)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.0f} h"
