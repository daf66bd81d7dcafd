"""Registers a worker process in the database, and the base models that its machine offers.

The API, which may run on another machine, knows workers and base models from these rows alone.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import tenacity

from store import models
from store.db.session import transaction
from store.errors import Unavailable
from store.jobs import reconcile
from store.ops import workers
from store.settings import StoreSettings
from worker.celery_app import Role
from worker.chores.chore import Chore, run_chores
from worker.chores.gpu_handoff import REQUEST, SERVED
from worker.context import Context
from worker.engine_process.child import Child, child_environment

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


@contextmanager
def registered(context: Context, role: Role) -> Iterator[None]:
    """Keeps the worker's row while the body runs, with a heartbeat. Waits for the database first.

    Jobs that the last worker of this name held are taken back at once: it is dead, and its leases need not run out.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_fixed(_RETRY_SECONDS),
        before_sleep=tenacity.before_sleep_log(log, logging.WARNING),
    )
    retrying(_register, context, role)
    heartbeat = Chore(
        name="heartbeat", seconds=context.settings.heartbeat_seconds, run=lambda: _heartbeat(context)
    )
    with run_chores([heartbeat]):
        yield
    try:
        with transaction(context.sessions) as session:
            workers.unregister(session, worker_id=context.worker_id)
    except Unavailable as error:
        log.warning("could not remove the worker's row: %s", error)


def _register(context: Context, role: Role) -> None:
    info = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": version("heft-service"),
        "devices": sorted(context.devices),
        REQUEST: None,
        SERVED: [],
    }
    with transaction(context.sessions) as session:
        workers.register(session, worker_id=context.worker_id, role=role, info=info)
        reconcile.take_back_from(
            session, worker_id=context.worker_id, max_lost_leases=context.settings.max_lost_leases
        )


def _heartbeat(context: Context) -> None:
    with transaction(context.sessions) as session:
        workers.heartbeat(session, worker_id=context.worker_id)


def offer_base_models(context: Context) -> None:
    """Records this machine and its base models, which a child process lists, since that needs torch.

    Raises Unavailable.
    """
    command = [*context.engine_command, "models", "--die-with-parent", *context.model_options()]
    with Child(command, env=child_environment(os.environ), cwd=context.scratch) as child:
        for line in child.lines():
            with transaction(context.sessions) as session:
                if "machine" in line:
                    machine = _machine_of_one_job(line["machine"], context.settings)
                    workers.update_info(session, worker_id=context.worker_id, changes={"machine": machine})
                    continue
                models.offer_base(
                    session,
                    model_id=line["id"],
                    source=line["source"],
                    revision=line["revision"],
                    info=line["info"],
                )
    with transaction(context.sessions) as session:
        workers.update_info(session, worker_id=context.worker_id, changes={workers.LISTED: True})


def _machine_of_one_job(machine: Mapping[str, Any], settings: StoreSettings) -> dict[str, Any]:
    """Returns the part of the engine's description of this machine that one job trains on, for plans."""
    gpus = machine["gpus"][: settings.train_processes]
    return {
        "gpus": len(gpus),
        "gpu_bytes": min(gpus, default=0) // settings.trainers,
        "host_bytes": machine["host_bytes"] // settings.trainers,
        "stage_bytes": settings.train_memory_bytes,
        "cache_memory_bytes": settings.cache_memory_bytes,
        "auto_dtype": machine["auto_dtype"],
    }
