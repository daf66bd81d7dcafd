"""Several workers that train one job together (store.jobs.groups): how machine 0 gathers them, and a member's part.

Machine 0 has the claim, runs rank 0 and writes everything. A member runs its ranks until they end, or the attempt does.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from heft_engine.commands.child_process import STOPPED
from heft_engine.commands.launch import listen
from heft_engine.config.run_file import FileField, RunFile
from store.db.session import transaction
from store.errors import LostFence, Unavailable
from store.jobs import groups, leases
from store.jobs.fence import Claim, StopRequest
from store.jobs.groups import GroupShape, Membership
from store.logs import bound
from store.settings import StoreSettings
from worker.chores.gpu_handoff import gpu_requested
from worker.context import Context
from worker.engine_process.supervisor import Limits, StopReason, Supervisor
from worker.jobs.attempt import Attempt, AttemptStopped, Error, Event
from worker.jobs.fetch_rows import fetch_rows
from worker.jobs.run_file import Node, hub_revision, run_file, train_config
from worker.jobs.start_model import fetch_start

log = logging.getLogger(__name__)


def shape_of(settings: StoreSettings) -> GroupShape:
    return GroupShape(nodes=settings.train_nodes, processes=settings.train_processes)


class GivesWay(Exception):
    """An earlier group of equal workers lacks members: this worker joins it instead."""


@contextmanager
def gathered(attempt: Attempt) -> Iterator[Node | None]:
    """Opens a group for the attempt, waits until its members are ready, and yields machine 0's place in it.

    Yields None where workers train alone. This machine listens at the rendezvous from here on, so that no other process
    takes the port. Raises GivesWay, AttemptStopped and LostFence.
    """
    settings = attempt.context.settings
    if settings.train_nodes == 1:
        yield None
        return
    with listen(0) as server:
        address = settings.train_address or socket.gethostname()
        node = Node(
            count=settings.train_nodes,
            rank=0,
            rendezvous=f"{address}:{server.getsockname()[1]}",
            secret=secrets.token_hex(32),
            listener=server.fileno(),
        )
        _gather(attempt, node)
        yield node


def _gather(attempt: Attempt, node: Node) -> None:
    """Returns when the group has started. Raises GivesWay, AttemptStopped and LostFence."""
    settings = attempt.context.settings
    attempt.write(
        partial(groups.open_group, shape=shape_of(settings), rendezvous=node.rendezvous, secret=node.secret)
    )
    hint_at = 0.0
    attempt.write(partial(leases.record_event, **_waiting_event(settings.train_nodes)))
    while not (group := attempt.write(groups.start_when_ready)).has_started:
        attempt.raise_if_stopping()
        if group.free_places and attempt.write(groups.gives_way):
            raise GivesWay
        if time.monotonic() >= hint_at:
            # Each hint wakes one worker; a lost one is sent again, as the reconciler does for jobs.
            hint_at = time.monotonic() + settings.sweep_seconds
            for _ in range(group.free_places):
                attempt.context.hints.hint(attempt.claim.job_id, "train")
        attempt.context.stopping.wait(settings.control_seconds)


def _waiting_event(nodes: int) -> dict[str, Any]:
    return {
        "code": "WAITING_FOR_WORKERS",
        "message": f"The job is trained by {nodes} workers together. It starts when all of them are free.",
        "data": {"workers": nodes},
    }


def join_group(context: Context) -> bool:
    """Joins the group that was opened first, if one lacks members, and trains a part of its job to the end.

    Returns False without such a group.
    """
    settings = context.settings
    with transaction(context.sessions) as session:
        membership = groups.join(
            session,
            worker_id=context.worker_id,
            shape=shape_of(settings),
            lease_seconds=settings.lease_seconds,
        )
    if membership is None:
        return False
    claim = membership.claim
    log.info("joins attempt %d at %s as machine %d", claim.attempt, claim.job_id, membership.node_rank)
    folder = Path(tempfile.mkdtemp(prefix=f"{claim.job_id}-{membership.node_rank}-", dir=context.scratch))
    try:
        with bound(job_id=claim.job_id, attempt=claim.attempt):
            _Member(context, membership, folder).run()
    except (AttemptStopped, LostFence, Unavailable) as error:
        log.info("machine %d of %s ends: %s", membership.node_rank, claim.job_id, error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


@dataclass
class _Member:
    """A member's part of an attempt."""

    context: Context
    membership: Membership
    folder: Path
    has_started: bool = False  #: all members of the group are ready
    error: Error | None = None  #: that its processes have failed with
    exit_code: int | None = None  #: of the process that starts this machine's ranks

    def run(self) -> None:
        """Trains until the ranks end. Raises AttemptStopped, LostFence and Unavailable."""
        with self._supervisor() as supervisor:
            attempt = Attempt(self.context, self.membership.claim, self.folder, supervisor)
            try:
                rows, start = fetch_rows(attempt), fetch_start(attempt)
                attempt.write(lambda session, _: groups.set_ready(session, self.membership))
                while not self.has_started:
                    attempt.raise_if_stopping()
                    self.context.stopping.wait(self.context.settings.control_seconds)
                with gpu_requested(self.context, f"{attempt.claim.job_id}/{attempt.claim.attempt}"):
                    run = self._run_file(attempt, rows, start)
                    self.exit_code = attempt.run_child("train", run, self._handle, self._node)
                log.info("machine %d's processes ended: %d", self.membership.node_rank, self.exit_code)
            finally:
                is_stopped = attempt.stop_reason is StopReason.SHUTDOWN
                attempt.write(partial(self._end, is_stopped=is_stopped))

    def _handle(self, event: Event) -> None:
        if event["code"] == "FAILED":
            self.error = event["data"]["error"]
            log.error("this machine's processes failed: %s", event["message"])

    def _end(self, session: Session, _: Claim, *, is_stopped: bool) -> None:
        """Gives up the place; if the group has started and this part has not ended as it should, says why.

        is_stopped: the worker was asked to stop. Processes that wait for machine 0's evaluation don't end in time then.
        """
        if self.exit_code in (0, STOPPED) or not groups.is_training(session, self.membership):
            groups.leave(session, self.membership)
            return
        error = groups.WORKER_STOPPED if is_stopped and self.error is None else self.error
        groups.fail(session, self.membership, error=error)

    def _run_file(self, attempt: Attempt, rows: Mapping[FileField, Path], start: Path | None) -> RunFile:
        config = train_config(attempt.claim.spec, revision=hub_revision(attempt.claim.validation))
        return run_file(config, self.folder, rows, self.context.settings, start=start, node=self._node)

    @property
    def _node(self) -> Node:
        return Node(
            count=self.context.settings.train_nodes,
            rank=self.membership.node_rank,
            rendezvous=self.membership.rendezvous,
            secret=self.membership.secret,
        )

    def _supervisor(self) -> Supervisor:
        limits = Limits.from_settings(self.context.settings)
        # Machine 0 alone emits events, and so notices a stall.
        return Supervisor(
            renew_lease=self._renew,
            read_stop_request=self._renew,
            stopping=self.context.stopping,
            limits=replace(limits, stall=float("inf")),
        )

    def _renew(self) -> StopRequest:
        """Renews the lease. Requests of the job's user reach these ranks through those of machine 0."""
        with transaction(self.context.sessions) as session:
            self.has_started = groups.renew(session, self.membership)
        return StopRequest(cancel=False, pause=False)
