"""The way of one question through the project's files: from `/predict` through broker, worker and model, and back.

    python -m benchmarks.question_path

Starts a private Postgres and Valkey, the API's application and an inference worker in this process, with a random model
of one layer. The second question is traced: each call of a function of the project counts, in the order of the calls.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import groupby
from pathlib import Path
from queue import Empty
from types import CodeType, FrameType
from typing import Any

import httpx
from kombu import Connection
from prometheus_client import CollectorRegistry

from api.app import create_app
from cli.stack.embedded import EmbeddedStack, embedded_stack
from cli.stack.home import Home
from heft_engine.gpu_check.job import write_tiny_model
from migrations import upgrade
from store import keys, models
from store.db.session import make_engine, session_factory, transaction
from store.messages.broker import connect_redis, make_celery
from store.messages.hints import Hints
from store.settings import StoreSettings
from store.storage.artifacts import Artifacts
from worker.context import Context
from worker.inference.metrics import InferenceMetrics
from worker.inference.models import Models
from worker.inference.predict import PredictHandler
from worker.inference.requests import Requests

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "store", "worker", "heft_engine")
#: The forward pass, whose layers and kernels differ between processors.
MODEL_PASS = ("heft_engine/model/", "heft_engine/cpu/", "heft_engine/runtime/")
KEY = "a key for this measurement"
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
QUESTION = {"model": "tiny", "question": "is the sky blue", "passage": "The sky was blue all day."}


class Trace:
    """The files of the project's functions that are called on any thread while `is_recording`."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.is_recording = False
        self._names: dict[CodeType, str | None] = {}
        self._resumable: set[FrameType] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, this thread and all that start are watched."""
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not self.is_recording:
            return
        code = frame.f_code
        if code not in self._names:
            self._names[code] = _project_file(code)
        name = self._names[code]
        if name is None or frame in self._resumable:
            return
        if code.co_flags & _RESUMABLE:
            self._resumable.add(frame)  # a "call" is also reported each time that it goes on
        self.files.append(name)


def _project_file(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    return relative.as_posix() if relative.parts[0] in PACKAGES else None


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        folder.chmod(0o711)  # Postgres' own user walks through it
        servers = stack.enter_context(embedded_stack(Home.at(folder / "home"), durable=False))
        upgrade(servers.database_url)
        (folder / "models").mkdir()
        write_tiny_model(folder / "models" / "tiny")
        settings = _settings(servers, folder)
        trace = Trace()
        stack.enter_context(trace.installed())
        stack.enter_context(_worker(settings, folder))
        print(asyncio.run(_ask_twice(settings, trace)))
    _print_path(trace.files)


def _settings(servers: EmbeddedStack, folder: Path) -> StoreSettings:
    (folder / "artifacts").mkdir()
    return StoreSettings(
        database_url=servers.database_url,
        redis_url=servers.redis_url,
        artifacts_url=(folder / "artifacts").as_uri(),
        model_dir=folder / "models",
        cache_dir=folder / "cache",
    )


@contextmanager
def _worker(settings: StoreSettings, folder: Path) -> Iterator[None]:
    """An inference worker on a thread, without Celery, whose frames are not the project's."""
    with ExitStack() as stack:
        engine = make_engine(settings.database_url)
        stack.callback(engine.dispose)
        sessions = session_factory(engine)
        with transaction(sessions) as session:
            keys.ensure(session, KEY, "owner", "measurement")
            models.offer_base(session, model_id="tiny", source="directory", info={"model_type": "llama"})
        context = Context(
            worker_id="inference-1",
            settings=settings,
            sessions=sessions,
            artifacts=Artifacts(settings.artifacts_url),
            hints=stack.enter_context(closing(Hints(make_celery(settings.redis_url)))),
            scratch=folder,
            shared=folder,
            stopping=threading.Event(),
        )
        metrics = InferenceMetrics(CollectorRegistry())
        loaded = stack.enter_context(closing(Models(context, metrics)))
        requests = stack.enter_context(closing(Requests(connect_redis(settings.redis_url))))
        handler = PredictHandler(loaded, requests, metrics)
        thread = threading.Thread(target=_consume, args=(context, handler), name="celery")
        thread.start()
        try:
            yield
        finally:
            context.stopping.set()
            thread.join()


def _consume(context: Context, handler: PredictHandler) -> None:
    with (
        Connection(context.settings.redis_url) as broker,
        broker.SimpleQueue("predict", no_ack=True) as messages,
    ):
        while not context.stopping.is_set():
            try:
                payload = messages.get(timeout=0.1).payload
            except Empty:
                continue
            handler.handle(payload[0][0])


async def _ask_twice(settings: StoreSettings, trace: Trace) -> Any:
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client,
    ):
        (await client.post("/predict", json=QUESTION)).raise_for_status()
        await asyncio.sleep(0.2)  # the worker counts a request after its reply
        trace.is_recording = True
        response = await client.post("/predict", json=QUESTION)
        await asyncio.sleep(0.2)
        trace.is_recording = False
        return response.raise_for_status().json()


def _print_path(files: list[str]) -> None:
    for name, _ in groupby(files):
        print(name)
    print()
    print(f"whole way: {_summary(files)}")
    print(f"without the model's pass: {_summary([f for f in files if not f.startswith(MODEL_PASS)])}")


def _summary(files: list[str]) -> str:
    visits = [name for name, _ in groupby(files)]
    returns = len(visits) - len(set(visits))
    return f"{len(set(visits))} files, {returns} returns to a file that was left"


if __name__ == "__main__":
    main()
