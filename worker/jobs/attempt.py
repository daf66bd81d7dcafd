"""One attempt at one job, from the claim to the write that lets go of it, whatever the work is.

The work is a function that gets the attempt and returns how it ends (a function of `store.jobs.endings`). What
is the same for every kind of work is here: the fence, the lease, the folder, the child, and what an
interruption leads to.

It does NOT know training from checking files: see `train_job` and `prepare`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from sqlalchemy.orm import Session

from store.db.session import transaction
from store.db.states import Purpose
from store.db.tables import Job
from store.errors import Damaged, LostFence, Unavailable
from store.jobs import endings, leases
from store.jobs.fence import Claim
from store.logs import bound
from worker.context import Context
from worker.engine_process.child import Child, child_environment
from worker.engine_process.supervisor import Limits, StopReason, Supervisor

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How an attempt ends: a function of `store.jobs.endings`, its arguments filled in.
Ending = Callable[[Session, Claim], Job]

#: How long a worker that shall stop waits for a database or a storage that is away. Then the lease ends the
#: attempt.
_SHUTDOWN_RETRY_SECONDS = 10.0
_RETRY_SECONDS = 2.0
#: Faults that are nobody's mistake: tried again, as if the child had died.
_TRANSIENT = frozenset({"hub_unavailable"})
_OUT_OF_MEMORY = "most likely because memory ran out: a smaller max_length needs less"


class Interrupted(Exception):
    """The attempt shall end before its work is done; `Attempt.interrupted` says how."""


@dataclass(frozen=True, kw_only=True)
class EngineExit:
    """How a child ended: its exit code (negative: the signal that ended it), and its last word if it said
    one."""

    code: int
    final_event: Mapping[str, Any] | None


class Attempt:
    """What the work needs: its claim, a folder of its own, writes under the fence, and a child under
    watch."""

    def __init__(self, context: Context, claim: Claim, folder: Path, watch: Supervisor) -> None:
        self.context = context
        self.claim = claim
        self.folder = folder
        self._watch = watch

    def write(self, do: Callable[[Session, Claim], T]) -> T:
        """One transaction under the fence, tried again while the database is away. Raises LostFence."""

        def once() -> T:
            with transaction(self.context.sessions) as session:
                return do(session, self.claim)

        return self._retry(once)

    def retrying(self, do: Callable[[], T]) -> T:
        """Try again while the storage is away: for ever, or a few seconds if the worker shall stop. Raises
        Interrupted once the job is cancelled or lost: a storage that is full would hold its end up for good."""

        def once() -> T:
            if self._watch.stop_reason in (StopReason.CANCELLED, StopReason.LOST):
                raise Interrupted(self._watch.stop_reason)
            return do()

        return self._retry(once)

    def _retry(self, do: Callable[[], T]) -> T:
        give_up = tenacity.stop_all(
            tenacity.stop_when_event_set(self.context.stopping),
            tenacity.stop_after_delay(_SHUTDOWN_RETRY_SECONDS),
        )
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_fixed(_RETRY_SECONDS),
            stop=give_up,
            reraise=True,
        )
        return retrying(do)

    @property
    def is_stopping(self) -> bool:
        """Whether it shall end: what the child says now are its last words."""
        return self._watch.stop_reason is not None

    def raise_if_stopping(self) -> None:
        """Raises Interrupted if the attempt shall end. For the moments in which no child is there to be
        ended."""
        if self._watch.stop_reason is not None:
            raise Interrupted(self._watch.stop_reason)

    def run_engine(self, argv: Sequence[str], hear: Callable[[dict[str, Any]], bool]) -> EngineExit:
        """Run a child to its end and hand every event to `hear`, which returns True for its last word.

        Raises Interrupted if it was ended without one; LostFence, and whatever `hear` raises, after ending
        it.
        """
        self.raise_if_stopping()
        final_event: Mapping[str, Any] | None = None
        with (
            Child(argv, env=child_environment(os.environ), cwd=self.folder) as child,
            self._watch.supervising(child),
        ):
            for event in child.lines():
                # Once cancelled, nothing that it still says is written.
                if self._watch.stop_reason not in (StopReason.CANCELLED, StopReason.LOST) and hear(event):
                    final_event = event
            code = child.wait()
        log.info("child %d of %s ended: %d", child.pid, self.claim.job_id, code)
        if final_event is None:
            self.raise_if_stopping()
        return EngineExit(code=code, final_event=final_event)

    def crashed(self, error: Mapping[str, Any]) -> Ending:
        """The ending for a child that went without a word."""
        settings = self.context.settings
        return partial(
            endings.record_crash,
            error=error,
            max_deaths=settings.max_trainer_deaths,
            pause_seconds=settings.death_pause_seconds,
        )

    def interrupted(self) -> Ending:
        """The ending for an attempt that was interrupted."""
        match self._watch.stop_reason:
            case StopReason.CANCELLED:
                return endings.finish_cancelled
            case StopReason.PAUSED:
                return endings.finish_paused
            case StopReason.SHUTDOWN:
                return endings.release
            case StopReason.STALLED:
                return self.crashed(
                    job_error("stalled", "The training process made no progress and was ended.")
                )
            case _:
                raise LostFence(f"attempt {self.claim.attempt} of {self.claim.job_id} is lost")


def run_attempt(
    context: Context, job_id: str, purpose: Purpose, work: Callable[[Attempt], Ending]
) -> Job | None:
    """Claim the job, do the work, let go. Returns the job as it then stands; None if it was not ours, or is
    no longer."""
    if context.stopping.is_set():
        return None  # the reconciler will send it to someone else
    claim = _claim(context, job_id, purpose)
    if claim is None:
        log.info("nothing to %s: %s", purpose, job_id)
        return None
    log.info("attempt %d at %s (%s) begins", claim.attempt, job_id, purpose)
    folder = Path(tempfile.mkdtemp(prefix=f"{job_id}-", dir=context.scratch))
    try:
        with bound(attempt=claim.attempt), _watch(context, claim) as watch:
            attempt = Attempt(context, claim, folder, watch)
            ending = _do(attempt, work)
            job = attempt.write(ending)
    except LostFence as fault:
        log.warning("%s; dropped", fault)
        return None
    except Unavailable as fault:
        log.error("attempt %d at %s could not be ended, its lease will: %s", claim.attempt, job_id, fault)
        return None
    finally:
        _clean_up(context, claim, folder)
    log.info("attempt %d at %s ended: the job is %s", claim.attempt, job_id, job.state)
    return job


def _clean_up(context: Context, claim: Claim, folder: Path) -> None:
    """Trouble here is noted beside the job's end, which it does not change."""
    try:
        shutil.rmtree(folder)
    except OSError as fault:
        log.exception("files of %s stay behind", claim.job_id)
        with suppress(Unavailable), transaction(context.sessions) as session:
            endings.record_cleanup_error(session, claim, f"files stay behind: {fault}")


def _do(attempt: Attempt, work: Callable[[Attempt], Ending]) -> Ending:
    """The work's own ending, or the one that fits what went wrong."""
    try:
        return work(attempt)
    except Interrupted:
        return attempt.interrupted()
    except (LostFence, Unavailable):
        raise
    except Damaged as fault:
        log.error("%s: %s", attempt.claim.job_id, fault)
        return attempt.crashed(job_error("storage_damaged", f"A stored file can't be used: {fault.message}."))
    except Exception:
        # A fault of ours must not hold the job until its lease runs out; it counts as a death, and three
        # end it.
        log.exception("attempt %d at %s failed", attempt.claim.attempt, attempt.claim.job_id)
        error = job_error("internal_error", "The worker failed; its log says why.")
        attempt.write(attempt.crashed(error))
        raise


def job_error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """A job's `error`, in words that tell its user what to change."""
    return {"code": code, "message": message, "param": param}


def crash_error(code: int) -> dict[str, Any]:
    """The error for a child that ended with this exit code and no last word."""
    if code == -signal.SIGKILL:
        return job_error("out_of_memory", f"The training process was killed, {_OUT_OF_MEMORY}.")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return job_error("trainer_died", f"The training process ended without a word ({how}).")


def failed(attempt: Attempt, error: Mapping[str, Any]) -> Ending:
    """The ending for a child that said what was wrong."""
    return (
        attempt.crashed(error) if error["code"] in _TRANSIENT else partial(endings.finish_failed, error=error)
    )


def _claim(context: Context, job_id: str, purpose: Purpose) -> Claim | None:
    with transaction(context.sessions) as session:
        return leases.claim(
            session,
            job_id=job_id,
            worker_id=context.worker_id,
            purpose=purpose,
            lease_seconds=context.settings.lease_seconds,
        )


def _watch(context: Context, claim: Claim) -> Supervisor:
    def ask(question: Callable[[Session, Claim], T]) -> T:
        with transaction(context.sessions) as session:
            return question(session, claim)

    return Supervisor(
        renew_lease=partial(ask, leases.heartbeat),
        read_stop_request=partial(ask, leases.read_stop_request),
        stopping=context.stopping,
        limits=Limits.from_settings(context.settings),
    )
