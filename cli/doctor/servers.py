"""Checks of API, database, broker, storage and disks, connecting as the service's processes do."""

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

_TIMEOUT_SECONDS = 3.0
_LOW_BYTES, _FULL_BYTES = 5 * 1024**3, 256 * 1024**2


def api(url: str) -> Finding:
    import httpx

    try:
        response = httpx.get(f"{url}/readyz", timeout=2 * _TIMEOUT_SECONDS, trust_env=False)
    except httpx.TransportError as error:
        advice = "start it: `heft up` for the whole service on this machine, `heft api` for the API only"
        return wrong("API", f"{url} does not answer ({error or type(error).__name__})", advice)
    if response.status_code == 200:
        return ok("API", f"{url} is ready")
    is_json = "json" in response.headers.get("content-type", "")
    reason = response.json()["error"]["message"] if is_json else response.text
    return wrong("API", f"{url} is not ready: {reason}", "see the checks below")


def database(sessions: SessionFactory) -> Finding:
    from sqlalchemy import text

    started = time.monotonic()
    try:
        with transaction(sessions) as session:
            version = session.scalar(text("SHOW server_version"))
    except Unavailable as fault:
        # The cause contains host and port, but not the password.
        cause = str(fault.__cause__).splitlines()[0] if fault.__cause__ else fault.message
        advice = "start Postgres (`heft up` starts its own), and check HEFT_DATABASE_URL"
        return wrong("database", f"does not answer: {cause}", advice)
    return ok("database", f"Postgres {version} answers in {1000 * (time.monotonic() - started):.0f} ms")


def tables(sessions: SessionFactory) -> Finding:
    from sqlalchemy import Engine

    from migrations import is_current

    with sessions() as session:
        engine = session.get_bind()
    assert isinstance(engine, Engine)
    if is_current(engine):
        return ok("migrations", "the schema is current")
    return wrong(
        "migrations", "the schema is of another version", "run `heft migrate`, then restart API and workers"
    )


def broker(settings: StoreSettings) -> Finding:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from store.messages.broker import Task, redis_py_url

    try:
        with redis.Redis.from_url(
            redis_py_url(settings.redis_url),
            socket_timeout=_TIMEOUT_SECONDS,
            socket_connect_timeout=_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            waiting = sum(int(client.llen(name)) for name in {task.queue for task in Task})
    except redis.RedisError as error:
        advice = "start Redis or Valkey; jobs wait in the database meanwhile"
        return wrong("broker", f"does not answer ({type(error).__name__})", advice)
    return ok("broker", f"answers; {waiting} messages waiting")


def storage(settings: StoreSettings) -> Finding:
    from store.storage.artifacts import Artifacts

    key, content = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(64)
    try:
        storage = Artifacts(settings.artifacts_url)
        try:
            storage.put_stream(key, [content])
            read_back = b"".join(storage.iter_bytes(key))
        finally:
            storage.delete(key)
    except (Unavailable, Damaged) as fault:
        advice = "check HEFT_ARTIFACTS_URL, its permissions and its free space; jobs wait meanwhile"
        return wrong("storage", fault.message, advice)
    if read_back != content:
        return wrong("storage", "a file read back differs from the file written", "check the disk")
    return ok("storage", "writes and reads files")


def disks(settings: StoreSettings) -> Iterator[Finding]:
    """Checks the local folders of this machine; workers elsewhere have disks of their own."""
    folders = {"disk of the storage": _local(settings.artifacts_url), "disk of the cache": settings.cache_dir}
    for name, path in folders.items():
        if path is None or not path.is_dir():
            continue
        usage = shutil.disk_usage(path)
        result = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free in {path}"
        advice = "delete unused models and files (`heft models delete`, `heft files delete`), or add space"
        if usage.free < _FULL_BYTES:
            yield wrong(name, result, advice)
        elif usage.free < _LOW_BYTES:
            yield warning(name, result, advice)
        else:
            yield ok(name, result)


def _local(url: str) -> Path | None:
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None
