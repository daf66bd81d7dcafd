"""`python -m worker train|prepare|inference` runs one worker process until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from celery import Celery
from platformdirs import user_cache_path
from prometheus_client import CollectorRegistry

from heft_engine.runtime.malloc import retain_freed_memory
from store import logs
from store.db.session import make_engine, session_factory
from store.messages.broker import connect_redis, make_celery
from store.messages.hints import Hints
from store.settings import StoreSettings, settings
from store.storage.artifacts import Artifacts
from worker import tasks
from worker.celery_app import Role, run_worker, worker_app
from worker.chores.chore import Chore, run_chores
from worker.chores.compare_studies import study_chore
from worker.chores.gpu_handoff import handoff_chores, visible_devices
from worker.chores.presence import offer_base_models, registered
from worker.chores.reconcile import reconcile_chores
from worker.context import ENGINE, Context
from worker.inference.metrics import InferenceMetrics, Publisher, worker_registry
from worker.scratch import acquire_slot, remove_older_than

_METRICS_SECONDS = 10.0
_OFFER_SECONDS = 3_600.0
_EXPIRE_SECONDS = 3_600.0
#: Since their last use.
_MAX_ACTIVATION_SECONDS = 86_400.0
_EVICT_SECONDS = 30.0
_TRIM_SECONDS = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("role", type=Role, choices=list(Role))
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args()
    run(options.role, settings(), log_level=options.log_level)


def run(
    role: Role, values: StoreSettings, *, log_level: str = "INFO", engine_command: Sequence[str] = ENGINE
) -> None:
    """Runs a worker of this role until SIGTERM or SIGINT."""
    logs.configure(values.log_format, level=log_level)
    if role is Role.INFERENCE:
        retain_freed_memory()
    with _context(role, values, engine_command) as context, ExitStack() as stack:
        app = worker_app(values.redis_url, role)
        role_chores = _register(app, role, context, stack)
        stack.enter_context(registered(context, role))
        stack.enter_context(run_chores([*reconcile_chores(context), *role_chores]))
        run_worker(app, role, worker_id=context.worker_id, stopping=context.stopping, log_level=log_level)


@contextmanager
def _context(role: Role, values: StoreSettings, engine_command: Sequence[str]) -> Iterator[Context]:
    root = (values.cache_dir or user_cache_path("heft")) / "workers"
    engine = make_engine(values.database_url)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        slot = stack.enter_context(acquire_slot(root, role))
        hints = stack.enter_context(closing(Hints(make_celery(values.redis_url))))
        yield Context(
            worker_id=slot.worker_id,
            settings=values,
            sessions=session_factory(engine),
            artifacts=Artifacts(values.artifacts_url),
            hints=hints,
            scratch=slot.folder,
            shared=root / "shared",
            stopping=threading.Event(),
            devices=visible_devices(),
            engine_command=engine_command,
        )


def _register(app: Celery, role: Role, context: Context, stack: ExitStack) -> list[Chore]:
    """Registers the role's tasks and returns its chores. Only the inference worker imports torch."""
    registry = worker_registry(role)
    if role is Role.TRAIN:
        tasks.register_training(app, context)
        offers = Chore(
            name="offer base models", seconds=_OFFER_SECONDS, run=lambda: offer_base_models(context)
        )
        # Whether or not anything trains: the rows may have been deleted since.
        expire = partial(remove_older_than, context.activation_folder, _MAX_ACTIVATION_SECONDS)
        expiry = Chore(name="expire activations", seconds=_EXPIRE_SECONDS, run=expire)
        return [offers, expiry, _metrics_chore(context, stack, registry)]
    if role is Role.PREPARE:
        tasks.register_preparing(app, context)
        return [study_chore(context), _metrics_chore(context, stack, registry)]
    from worker.inference.generate import GenerateHandler
    from worker.inference.models import Models
    from worker.inference.predict import PredictHandler
    from worker.inference.requests import Requests

    metrics = InferenceMetrics(registry)
    requests = stack.enter_context(closing(Requests(connect_redis(context.settings.redis_url))))
    models = stack.enter_context(closing(Models(context, metrics)))
    predict, generate = PredictHandler(models, requests, metrics), GenerateHandler(models, requests)
    tasks.register_inference(app, predict.handle, generate.handle)
    return [
        *handoff_chores(context, models.pool.evict_idle, models.leave_free),
        Chore(name="evict deleted models", seconds=_EVICT_SECONDS, run=models.evict_deleted),
        Chore(name="trim memory", seconds=_TRIM_SECONDS, run=models.trim_memory),
        _metrics_chore(context, stack, registry, models.record_usage),
    ]


def _metrics_chore(
    context: Context,
    stack: ExitStack,
    registry: CollectorRegistry,
    refresh: Callable[[], None] = lambda: None,
) -> Chore:
    publisher = stack.enter_context(closing(Publisher(context, registry, refresh)))
    return Chore(name="metrics", seconds=_METRICS_SECONDS, run=publisher.publish)


if __name__ == "__main__":
    main()
