"""A worker makes itself known: its row while it lives, and the base models that it can offer.

The API, which may run on another machine, knows workers and models from these rows alone.
It does NOT take part in any job.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import tenacity

from store import models
from store.db.session import transaction
from store.errors import Unavailable
from store.jobs import reconcile
from store.ops import workers
from worker.celery_app import Role
from worker.chores.chore import Chore, chores
from worker.context import Context
from worker.engine_process.child import Child, child_environment

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


@contextmanager
def present(context: Context, role: Role) -> Iterator[None]:
    """Be known while the body runs; it begins when the database has answered.

    What the former holder of this worker's name held is taken back first: it is dead, and need not be waited
    for.
    """
    patient = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_fixed(_RETRY_SECONDS),
        before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
    )
    patient(_enter, context, role)
    seen = Chore(name="presence", seconds=context.settings.heartbeat_seconds, do=lambda: _seen(context))
    with chores([seen]):
        yield
    try:
        with transaction(context.sessions) as session:
            workers.forget(session, worker_id=context.worker_id)
    except Unavailable as fault:
        log.warning("the worker's row stays behind: %s", fault)


def _enter(context: Context, role: Role) -> None:
    info = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": version("heft-service"),
        "device": context.device,
        "gpu_requested": None,
        "gpu_released_to": [],
    }
    with transaction(context.sessions) as session:
        workers.register(session, worker_id=context.worker_id, role=role, info=info)
        reconcile.take_back_from(
            session, worker_id=context.worker_id, max_lost_leases=context.settings.max_lost_leases
        )


def _seen(context: Context) -> None:
    with transaction(context.sessions) as session:
        workers.heartbeat(session, worker_id=context.worker_id)


def offer_base_models(context: Context) -> None:
    """Find this machine's base models, in a child since that takes torch, and make them known. Raises
    Unavailable."""
    settings = context.settings
    command = [*context.engine_command, "models", "--die-with-parent"]
    for option, path in (("--model-dir", settings.model_dir), ("--cache-dir", settings.cache_dir)):
        command += [option, str(path)] if path is not None else []
    with Child(command, env=child_environment(os.environ), cwd=context.scratch) as child:
        for found in child.lines():
            with transaction(context.sessions) as session:
                models.offer_base(
                    session,
                    model_id=found["id"],
                    source=found["source"],
                    revision=found["revision"],
                    info=found["info"],
                )
