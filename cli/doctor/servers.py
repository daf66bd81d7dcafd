"""The servers that the service stands on, asked as its processes ask them: does each answer, and is there room?

It does NOT read what is in the tables: see doctor.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from cli.doctor.finding import Finding, ok, warning, wrong
from store.db.session import SessionFactory, transaction
from store.errors import Damaged, Unavailable
from store.settings import StoreSettings

_ANSWER_SECONDS = 3.0
_LITTLE_BYTES, _NO_BYTES = 5 * 1024**3, 256 * 1024**2


def api(url: str) -> Finding:
    import httpx

    try:
        answer = httpx.get(f"{url}/readyz", timeout=2 * _ANSWER_SECONDS, trust_env=False)
    except httpx.TransportError as error:
        advice = "start it: `heft up` for all of it on this machine, `heft api` for the API alone"
        return wrong("API", f"{url} does not answer ({error or type(error).__name__})", advice)
    if answer.status_code == 200:
        return ok("API", f"{url} is ready")
    reason = (
        answer.json()["error"]["message"] if "json" in answer.headers.get("content-type", "") else answer.text
    )
    return wrong("API", f"{url} is not ready: {reason}", "the checks below say what it lacks")


def database(sessions: SessionFactory) -> Finding:
    from sqlalchemy import text

    started = time.monotonic()
    try:
        with transaction(sessions) as session:
            version = session.scalar(text("SHOW server_version"))
    except Unavailable as fault:
        # The cause names host and port, never the password.
        cause = str(fault.__cause__).splitlines()[0] if fault.__cause__ else fault.message
        advice = "start Postgres (`heft up` brings its own), and compare HEFT_DATABASE_URL with it"
        return wrong("database", f"it does not answer: {cause}", advice)
    return ok("database", f"Postgres {version} answers in {1000 * (time.monotonic() - started):.0f} ms")


def tables(sessions: SessionFactory) -> Finding:
    from sqlalchemy import Engine

    from migrations import is_current

    with sessions() as session:
        engine = session.get_bind()
    assert isinstance(engine, Engine)
    if is_current(engine):
        return ok("migrations", "the tables are those of this version")
    return wrong(
        "migrations", "the tables are of another version", "run `heft migrate`, then restart API and workers"
    )


def broker(settings: StoreSettings) -> Finding:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from store.messages.broker import Task, redis_py_url

    try:
        with redis.Redis.from_url(
            redis_py_url(settings.redis_url),
            socket_timeout=_ANSWER_SECONDS,
            socket_connect_timeout=_ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            waiting = sum(int(client.llen(name)) for name in {task.queue for task in Task})
    except redis.RedisError as error:
        advice = "start Redis or Valkey; jobs wait in the database meanwhile, and none is lost"
        return wrong("broker", f"it does not answer ({type(error).__name__})", advice)
    return ok("broker", f"answers; {waiting} messages wait")


def storage(settings: StoreSettings) -> Finding:
    from store.storage.artifacts import Artifacts

    key, content = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        storage = Artifacts(settings.artifacts_url)
        try:
            storage.put_stream(key, [content])
            back = b"".join(storage.iter_bytes(key))
        finally:
            storage.delete(key)
    except (Unavailable, Damaged) as fault:
        advice = "compare HEFT_ARTIFACTS_URL, its rights and its free space; jobs wait until it is back"
        return wrong("storage", fault.message, advice)
    if back != content:
        return wrong("storage", "it gives back other bytes than it got", "do not trust this disk")
    return ok("storage", "takes a file and gives it back")


def disks(settings: StoreSettings) -> Iterator[Finding]:
    """Local folders of this machine alone: a worker elsewhere has disks of its own."""
    places = {"disk of the storage": _local(settings.artifacts_url), "disk of the cache": settings.cache_dir}
    for name, path in places.items():
        if path is None or not path.is_dir():
            continue
        usage = shutil.disk_usage(path)
        found = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free in {path}"
        advice = "delete models and files that nobody needs (`heft models delete`, `heft files delete`), or add space"
        if usage.free < _NO_BYTES:
            yield wrong(name, found, advice)
        elif usage.free < _LITTLE_BYTES:
            yield warning(name, found, advice)
        else:
            yield ok(name, found)


def _local(url: str) -> Path | None:
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None
