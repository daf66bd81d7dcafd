"""One attempt at one job, from its claim to the write that ends it.

`run_attempt` does what is the same for every kind of work: the fence, the lease, the folder, the engine process, and
the end of an attempt that is stopped or fails. The work itself is a function of the attempt. It returns an ending: a
function of `store.jobs.endings` with its arguments bound.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from pydantic import BaseModel
from sqlalchemy.orm import Session

from heft_engine.commands.child_process import STOPPED
from heft_engine.errors import RankLost
from store.db.session import transaction
from store.db.states import Purpose
from store.db.tables import Job
from store.errors import Damaged, LostFence, Unavailable
from store.jobs import endings, groups, leases
from store.jobs.fence import Claim, StopRequest
from store.logs import bound
from worker.context import Context
from worker.engine_process.child import Child, child_environment
from worker.engine_process.supervisor import Limits, StopReason, Supervisor
from worker.jobs.member_failures import first_cause
from worker.jobs.run_file import Node

log = logging.getLogger(__name__)

T = TypeVar("T")
Error = Mapping[str, Any]  #: a job's `error`: {code, message, param}
Event = dict[str, Any]  #: an event of the engine: {code, type, level, message, data, time}
Ending = Callable[[Session, Claim], Job]

_released_for_another = partial(endings.release, reason="Another worker that trains it was asked to stop.")
#: A worker that shuts down retries this long while the database or the storage is away. Then the lease expires.
_SHUTDOWN_RETRY_SECONDS = 10.0
_RETRY_SECONDS = 2.0
#: Errors that are not the user's mistake: the attempt counts as crashed and is tried again.
_TRANSIENT_CODES = frozenset(
    {"forged_message", "gpu_unusable", "hub_unavailable", "rank_lost", "wrong_secret"}
)
_OUT_OF_MEMORY = (
    "The training process was killed, most likely because memory ran out: a smaller max_length needs less."
)


class AttemptStopped(Exception):
    """The supervisor stopped the attempt before its work was done."""


class EngineFailed(Exception):
    """The engine process reported an error."""

    def __init__(self, error: Error) -> None:
        super().__init__(error["message"])
        self.error = error


class EngineCrashed(Exception):
    """The engine process ended without a final event. A negative exit code is the signal that ended it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code

    @property
    def error(self) -> Error:
        if self.exit_code == -signal.SIGKILL:
            return job_error("out_of_memory", _OUT_OF_MEMORY)
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return job_error("trainer_died", f"The training process ended without a result ({how}).")


class Attempt:
    """A claimed job, a folder for its files, writes under the fence, and an engine process under supervision."""

    def __init__(self, context: Context, claim: Claim, folder: Path, supervisor: Supervisor) -> None:
        self.context = context
        self.claim = claim
        self.folder = folder
        self._supervisor = supervisor

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the attempt must end; None while it may go on. A graver reason may replace it."""
        return self._supervisor.stop_reason

    def raise_if_stopping(self) -> None:
        """Raises AttemptStopped. Called between steps in which no engine process runs."""
        if self.stop_reason is not None:
            raise AttemptStopped(self.stop_reason)

    def write(self, operation: Callable[[Session, Claim], T]) -> T:
        """Runs one transaction under the fence; retries while the database is away. Raises LostFence."""

        def run_once() -> T:
            with transaction(self.context.sessions) as session:
                return operation(session, self.claim)

        return self._retry(run_once)

    def retry_storage(self, operation: Callable[[], T]) -> T:
        """Retries while the storage is away; a few seconds only once the worker shuts down.

        Raises AttemptStopped when the job is cancelled or lost: a full storage must not delay its end.
        """

        def run_once() -> T:
            if self.stop_reason in (StopReason.CANCELLED, StopReason.LOST):
                raise AttemptStopped(self.stop_reason)
            return operation()

        return self._retry(run_once)

    def _retry(self, run_once: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_fixed(_RETRY_SECONDS),
            stop=tenacity.stop_all(
                tenacity.stop_when_event_set(self.context.stopping),
                tenacity.stop_after_delay(_SHUTDOWN_RETRY_SECONDS),
            ),
            reraise=True,
        )
        return retrying(run_once)

    def run_engine(
        self,
        command: str,
        run_file: BaseModel,
        *,
        final_code: str,
        handle: Callable[[Event], None],
        node: Node | None = None,
    ) -> Mapping[str, Any]:
        """Runs `heft_engine <command>` to its end, with `handle` called for every event but the final one.

        node: this machine, where several train the job. Returns the data of the final event. Raises EngineFailed,
        EngineCrashed, AttemptStopped, and whatever `handle` raises, after the process has ended.
        """
        final_event: Event | None = None

        def handle_all(event: Event) -> None:
            nonlocal final_event
            if event["code"] in (final_code, "FAILED"):
                final_event = event
            else:
                handle(event)

        exit_code = self.run_child(command, run_file, handle_all, node)
        if final_event is None:
            self.raise_if_stopping()
            if exit_code == STOPPED:
                raise AttemptStopped("another worker that trains the job was asked to stop")
            raise EngineCrashed(exit_code)
        data: Mapping[str, Any] = final_event["data"]
        if final_event["code"] == "FAILED":
            raise EngineFailed(data["error"])
        return data

    def run_child(
        self,
        command: str,
        run_file: BaseModel,
        handle: Callable[[Event], None],
        node: Node | None = None,
    ) -> int:
        """Runs `heft_engine <command>` to its end, with `handle` called for every event. Returns its exit code."""
        self.raise_if_stopping()
        path = self.folder / f"{command}.json"
        path.write_text(run_file.model_dump_json())
        argv = [*self.context.engine_command, command, "--run-file", str(path), "--die-with-parent"]
        env = child_environment(os.environ) | (node.environment if node is not None else {})
        descriptors = node.descriptors if node is not None else ()
        with (
            Child(argv, env=env, cwd=self.folder, descriptors=descriptors) as child,
            self._supervisor.supervising(child),
        ):
            for event in child.lines():
                if self.stop_reason not in (StopReason.CANCELLED, StopReason.LOST):
                    handle(event)  # else nothing more of this attempt is written
            exit_code = child.wait()
        log.info("child %d of %s ended: %d", child.pid, self.claim.job_id, exit_code)
        return exit_code


def run_attempt(
    context: Context, job_id: str, purpose: Purpose, work: Callable[[Attempt], Ending]
) -> Job | None:
    """Claims the job, does the work and ends the attempt.

    Returns the job afterwards; None if it could not be claimed, or the claim was lost.
    """
    if context.stopping.is_set():
        return None  # the reconciler sends the hint to another worker
    claim = _claim(context, job_id, purpose)
    if claim is None:
        log.info("nothing to %s: %s", purpose, job_id)
        return None
    log.info("attempt %d at %s (%s) begins", claim.attempt, job_id, purpose)
    folder = Path(tempfile.mkdtemp(prefix=f"{job_id}-", dir=context.scratch))
    try:
        with bound(attempt=claim.attempt), _supervisor(context, claim) as supervisor:
            attempt = Attempt(context, claim, folder, supervisor)
            ending = _run_work(attempt, work)
            job = attempt.write(ending)
    except LostFence as error:
        log.warning("%s; dropped", error)
        return None
    except Unavailable as error:
        log.error("attempt %d at %s ends when its lease expires: %s", claim.attempt, job_id, error)
        return None
    finally:
        _remove_folder(context, claim, folder)
    log.info("attempt %d at %s ended: the job is %s", claim.attempt, job_id, job.state)
    return job


def _claim(context: Context, job_id: str, purpose: Purpose) -> Claim | None:
    with transaction(context.sessions) as session:
        return leases.claim(
            session,
            job_id=job_id,
            worker_id=context.worker_id,
            purpose=purpose,
            lease_seconds=context.settings.lease_seconds,
        )


def _is_grouped(context: Context, claim: Claim) -> bool:
    """Returns True where several workers train a job together."""
    return claim.purpose == "train" and context.settings.train_nodes > 1


def _supervisor(context: Context, claim: Claim) -> Supervisor:
    def renew_lease() -> StopRequest:
        with transaction(context.sessions) as session:
            request = leases.heartbeat(session, claim)
            is_lost = _is_grouped(context, claim) and groups.has_lost_member(session, claim)
            return replace(request, member_lost=is_lost)

    def read_stop_request() -> StopRequest:
        with transaction(context.sessions) as session:
            return leases.read_stop_request(session, claim)

    return Supervisor(
        renew_lease=renew_lease,
        read_stop_request=read_stop_request,
        stopping=context.stopping,
        limits=Limits.from_settings(context.settings),
    )


def _run_work(attempt: Attempt, work: Callable[[Attempt], Ending]) -> Ending:
    """Returns the work's ending, or the one for what stopped it."""
    settings = attempt.context.settings
    crashed = partial(
        endings.record_crash,
        max_deaths=settings.max_trainer_deaths,
        pause_seconds=settings.death_pause_seconds,
    )
    try:
        return work(attempt)
    except AttemptStopped:
        return _stopped(attempt, crashed)
    except EngineFailed as failure:
        is_lost = failure.error["code"] == RankLost.code
        return _failed(_first_cause(attempt, failure.error) if is_lost else failure.error, crashed)
    except EngineCrashed as crash:
        cause = _first_cause(attempt, crash.error)
        return partial(crashed, error=cause) if cause == crash.error else _failed(cause, crashed)
    except (LostFence, Unavailable):
        raise
    except Damaged as damage:
        log.error("%s: %s", attempt.claim.job_id, damage)
        message = f"A stored file can't be used: {damage.message}."
        return partial(crashed, error=job_error("storage_damaged", message))
    except Exception:
        # A bug must not hold the job until its lease expires; it counts as a crash, and three end the job.
        log.exception("attempt %d at %s failed", attempt.claim.attempt, attempt.claim.job_id)
        error = job_error("internal_error", "The worker failed; its log says why.")
        attempt.write(partial(crashed, error=error))
        raise


def _first_cause(attempt: Attempt, error: Error) -> Error:
    """Returns the error of another worker's processes that has led to `error`; `error` of an attempt without others."""
    context = attempt.context
    if not _is_grouped(context, attempt.claim):
        return error
    pause = partial(context.stopping.wait, context.settings.control_seconds)
    return first_cause(error, partial(attempt.write, groups.member_failures), pause)


def _failed(error: Error, crashed: Callable[..., Job]) -> Ending:
    """Returns the ending of an attempt in which an engine has reported an error, this worker's or a member's."""
    if error["code"] == groups.WORKER_STOPPED["code"]:
        return _released_for_another
    if error["code"] in _TRANSIENT_CODES:
        return partial(crashed, error=error)
    return partial(endings.finish_failed, error=error)


def _stopped(attempt: Attempt, crashed: Callable[..., Job]) -> Ending:
    match attempt.stop_reason:
        case StopReason.CANCELLED:
            return endings.finish_cancelled
        case StopReason.PAUSED:
            return endings.finish_paused
        case StopReason.SHUTDOWN:
            return endings.release
        case StopReason.STALLED:
            error = job_error("stalled", "The training process made no progress and was ended.")
            return partial(crashed, error=error)
        case StopReason.MEMBER_LOST:
            lost = job_error(RankLost.code, "Another worker that trains this job was lost.")
            return _failed(_first_cause(attempt, lost), crashed)
        case None:
            return _released_for_another
        case _:
            raise LostFence(f"attempt {attempt.claim.attempt} of {attempt.claim.job_id} is lost")


def _remove_folder(context: Context, claim: Claim, folder: Path) -> None:
    """Removes the attempt's files. An error is stored beside the job's end and does not change it."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.exception("files of %s remain", claim.job_id)
        with suppress(Unavailable), transaction(context.sessions) as session:
            endings.record_cleanup_error(session, claim, f"files remain: {error}")


def job_error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Returns a job's `error`; the message tells its user what to change."""
    return {"code": code, "message": message, "param": param}
