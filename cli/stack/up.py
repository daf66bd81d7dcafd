"""`heft up`: the whole service on one machine, with a private Postgres and Valkey or with external ones."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cli.errors import CommandError
from cli.stack.home import Home
from cli.stack.postgres import Postgres
from cli.stack.process import last_lines
from cli.stack.supervise import Program, Supervisor
from cli.stack.valkey import Valkey

OWNER = "default"  #: the owner of the first key; model ids contain it
_READY_SECONDS = 120.0
#: Without base models after this time, it goes on without.
_MODELS_SECONDS = 45.0
#: A worker writes a checkpoint before it stops.
_WORKER_STOP_SECONDS = 65.0
_API_STOP_SECONDS = 10.0
_WORKERS = {"prepare": "prepare worker", "inference": "inference worker"}


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """The options of `heft up`. Without URLs it starts its own servers, without a key it creates one."""

    host: str = "127.0.0.1"
    port: int = 8000  #: 0: any free one
    api_key: str | None = None
    database_url: str | None = None
    redis_url: str | None = None
    artifacts_url: str | None = None
    model_dir: Path | None = None
    trainers: int = 1  #: training workers; they share the machine's processors


@dataclass(frozen=True, kw_only=True)
class RunningStack:
    """The URLs and folders of a running stack, stored in its home for the other commands."""

    url: str
    database_url: str
    redis_url: str
    artifacts_url: str
    model_dir: str
    cache_dir: str

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that `store.settings` reads."""
        return {
            "HEFT_DATABASE_URL": self.database_url,
            "HEFT_REDIS_URL": self.redis_url,
            "HEFT_ARTIFACTS_URL": self.artifacts_url,
            "HEFT_MODEL_DIR": self.model_dir,
            "HEFT_CACHE_DIR": self.cache_dir,
        }


def running_stack(home: Home) -> RunningStack | None:
    """Returns the stack that runs in a home. A killed one may still be returned, but does not answer."""
    try:
        return RunningStack(**json.loads(home.state_file.read_text()))
    except FileNotFoundError:
        return None


@contextmanager
def up(
    home: Home, options: UpOptions, report: Callable[[str], None]
) -> Iterator[tuple[RunningStack, Supervisor]]:
    """Runs the whole service during the `with` block.

    Raises AlreadyRunning for a second one in the same home, CommandError if a process does not start.
    """
    if options.model_dir is not None and not options.model_dir.is_dir():
        raise CommandError(f"HEFT_MODEL_DIR: {options.model_dir} is not a folder")
    if options.api_key is not None:
        _check_key(options.api_key)
    with home.occupied(), _listen(options.host, options.port) as listener:
        home.state_file.unlink(missing_ok=True)
        supervisor = Supervisor(report)
        try:
            stack = _start(home, options, supervisor, listener)
            write_private(home.state_file, json.dumps(asdict(stack)))
            yield stack, supervisor
        finally:
            home.state_file.unlink(missing_ok=True)
            supervisor.stop()


def _start(home: Home, options: UpOptions, supervisor: Supervisor, listener: socket.socket) -> RunningStack:
    redis_url, database_url = options.redis_url, options.database_url
    if redis_url is None:
        valkey = Valkey(home)
        supervisor.start(valkey)
        redis_url = valkey.url
    if database_url is None:
        postgres = Postgres(home)
        supervisor.start(postgres)
        database_url = postgres.url
    host, port = listener.getsockname()[:2]
    stack = RunningStack(
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
        database_url=database_url,
        redis_url=redis_url,
        artifacts_url=options.artifacts_url or f"file://{home.artifacts}",
        model_dir=str((options.model_dir or home.models).absolute()),
        cache_dir=os.environ.get("HEFT_CACHE_DIR") or str(home.cache),
    )
    _prepare_database(home, options, database_url)
    environment = _environment(stack) | {"HEFT_HOST": host, "HEFT_PORT": str(port)}
    api = Program(
        name="API",
        command=[sys.executable, "-P", "-m", "cli", "api", "--fd", str(listener.fileno())],
        environment=environment,
        log=home.logs / "api.log",
        stop_seconds=_API_STOP_SECONDS,
        keep_open=[listener.fileno()],
    )
    supervisor.start(api)
    trainer_environment = {**environment, "HEFT_TRAINERS": str(options.trainers)}
    if options.trainers > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // options.trainers)
        trainer_environment.setdefault("OMP_NUM_THREADS", str(threads))
    for number in range(1, options.trainers + 1):
        name, suffix = ("training worker", "") if number == 1 else (f"training worker {number}", f"-{number}")
        log = home.logs / f"worker-train{suffix}.log"
        supervisor.start(_worker("train", name, log, trainer_environment))
    for role, name in _WORKERS.items():
        supervisor.start(_worker(role, name, home.logs / f"worker-{role}.log", environment))
    _wait_until_ready(supervisor, api, stack.url)
    return stack


def _worker(role: str, name: str, log: Path, environment: Mapping[str, str]) -> Program:
    command = [sys.executable, "-P", "-m", "worker", role]
    return Program(
        name=name, command=command, environment=environment, log=log, stop_seconds=_WORKER_STOP_SECONDS
    )


def _environment(stack: RunningStack) -> dict[str, str]:
    """Returns the environment of the service's processes: this shell's, without the client's settings."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("HEFT_API_KEY", "HEFT_URL")
    }
    # The workers share the cores. A training step took 5 times as long with OpenMP threads that spin while they wait as
    # with threads that sleep (two cores, with other processes running).
    shared_cores = {"GOMP_SPINCOUNT": "30000"}
    return shared_cores | inherited | stack.environment() | {"PYTHONUNBUFFERED": "1"}


def _prepare_database(home: Home, options: UpOptions, database_url: str) -> None:
    from migrations import upgrade
    from store import keys
    from store.db.session import make_engine, session_factory, transaction

    upgrade(database_url)
    engine = make_engine(database_url, pool_size=1)
    try:
        with transaction(session_factory(engine)) as session:
            keys.ensure(session, options.api_key or first_key(home), OWNER, "first key")
    finally:
        engine.dispose()


def _check_key(key: str) -> None:
    """Raises CommandError for a key that the service would refuse."""
    from store import keys
    from store.errors import Unauthenticated

    try:
        keys.check_form(key)
    except Unauthenticated as fault:
        raise CommandError(f"HEFT_API_KEY: {fault.message}") from None


def first_key(home: Home) -> str:
    """Returns the key in the home's file, and creates it if there is none."""
    try:
        return home.key_file.read_text().strip()
    except FileNotFoundError:
        key = f"heft_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"
        write_private(home.key_file, key + "\n")
        return key


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600 atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    partial.replace(path)


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Opens the API's socket in this process, so that clients wait, and are not refused, while the API restarts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise CommandError(
                f"can't listen on {host}:{port}: {error.strerror}; "
                "stop the program that does, or choose another port with HEFT_PORT"
            ) from None
        listener.listen(2048)
        yield listener


def _wait_until_ready(supervisor: Supervisor, api: Program, url: str) -> None:
    import httpx

    def ready() -> bool:
        if api.process is not None and api.process.poll() is not None:
            raise CommandError(f"the API did not start; the end of {api.log}:\n{last_lines(api.log)}")
        return readiness() is not None

    def readiness() -> dict[str, object] | None:
        try:
            response = httpx.get(f"{url}/readyz", timeout=2, trust_env=False)
        except httpx.TransportError:
            return None
        body: dict[str, object] = response.json()
        return body if response.status_code == 200 else None

    def complete() -> bool:
        answer = readiness()
        return answer is not None and not answer["coming"]

    if not supervisor.watch(until=ready, seconds=_READY_SECONDS):
        raise CommandError(f"{url}/readyz did not answer in {_READY_SECONDS:g} s; see {api.log}")
    # A job or a question to a base model would be refused before.
    supervisor.watch(until=complete, seconds=_MODELS_SECONDS)
