"""The FastAPI application: routers, error handlers, middleware and lifespan.

Served by `uvicorn api.app:create_app --factory`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from api.admission import Admission, QueueDepth
from api.clients.generate import TextClient
from api.clients.predict import PredictClient
from api.database import Database
from api.deps import Services
from api.door.bodies import ArrivalRate, BodyMemory, BodyMiddleware, bounds_by_route
from api.door.hosts import HostMiddleware, allowed_hosts
from api.door.keys import DOCS_FILES, KeyMiddleware
from api.door.wrong_keys import WrongKeys
from api.errors import ErrorBody, add_handlers
from api.metrics import ApiMetrics
from api.metrics_page import MetricsPage
from api.middleware import RequestMiddleware
from api.routes import completions, events, files, health, jobs, models, predict, studies
from api.routes import metrics as metrics_route
from store.db.session import make_engine, session_factory
from store.messages.broker import Task, make_celery
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.settings import settings as settings_of_process
from store.storage.artifacts import Artifacts

DESCRIPTION = """Fine-tune language models coarse to fine (LoRA, merge, then LoReFT) and ask them.

Wire-compatible with OpenAI's fine-tuning API: the `openai` package works against it with `base_url` and
`api_key` changed and nothing else."""


def create_app(settings: StoreSettings | None = None) -> FastAPI:
    """Returns the API for `settings` (None: of the environment). Connects to nothing before the first request."""
    chosen = settings or settings_of_process()
    metrics = ApiMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(chosen, metrics) as services:
            app.state.services = services
            yield

    app: FastAPI = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url=DOCS_FILES,
        title="HEFT as a service",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"default": {"model": ErrorBody, "description": "OpenAI's error object"}},
    )
    add_handlers(app)
    # The last one added is the outermost.
    slowest = ArrivalRate(
        grace_seconds=chosen.body_grace_seconds, bytes_per_second=chosen.body_bytes_per_second
    )
    memory = BodyMemory(chosen.max_body_memory_bytes)
    app.add_middleware(BodyMiddleware, routes=bounds_by_route(chosen), slowest=slowest, memory=memory)
    app.add_middleware(KeyMiddleware, wrong_keys=WrongKeys(chosen.wrong_keys_per_minute))
    app.add_middleware(HostMiddleware, hosts=allowed_hosts(chosen))
    app.add_middleware(RequestMiddleware, max_header_bytes=chosen.max_header_bytes, metrics=metrics)
    for module in (files, jobs, events, studies, models, predict, completions, health, metrics_route):
        app.include_router(module.router)
    return app


@asynccontextmanager
async def running(settings: StoreSettings, metrics: ApiMetrics) -> AsyncIterator[Services]:
    """Starts the services of the routes, and closes them at the end."""
    engine = make_engine(settings.database_url)
    database = Database(session_factory(engine))
    celery = make_celery(settings.redis_url, name="heft-api")
    hints = Hints(celery)
    client = PredictClient(celery, settings.redis_url, timeout=settings.predict_timeout_seconds)
    client.start()
    depth = QueueDepth(client.redis, Task.PREDICT.queue)
    admission = Admission(
        max_waiting=settings.predict_max_waiting,
        max_queued=settings.predict_max_queued,
        timeout=settings.predict_timeout_seconds,
        queued=depth,
    )
    text_admission = Admission(
        max_waiting=settings.generate_max_waiting,
        max_queued=settings.predict_max_queued,
        timeout=settings.generate_timeout_seconds,
        queued=depth,
    )
    metrics.watch_waiting(lambda: admission.waiting)
    try:
        yield Services(
            settings=settings,
            database=database,
            artifacts=Artifacts(settings.artifacts_url),
            hints=hints,
            predict=client,
            admission=admission,
            texts=TextClient(client, timeout=settings.generate_timeout_seconds),
            text_admission=text_admission,
            metrics_page=MetricsPage(metrics.registry, database, client.redis),
        )
    finally:
        await depth.close()
        await client.close()
        hints.close()
        database.close()
        engine.dispose()
