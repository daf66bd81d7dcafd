"""Commands that run the service: the whole on this machine, or one process of it."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import CommandError
from cli.options import target

#: Idle connections are closed after this time. uvicorn's default of 5 s is also httpx's (and the openai package's), so
#: that the server sometimes closed a connection just as a client reused it.
_KEEP_ALIVE_SECONDS = 75
_MAX_DESCRIPTORS = 65_536
_URLS = ("HEFT_DATABASE_URL", "HEFT_REDIS_URL", "HEFT_ARTIFACTS_URL")


class Role(StrEnum):
    TRAIN = "train"
    PREPARE = "prepare"
    INFERENCE = "inference"


Host = Annotated[str, typer.Option(envvar="HEFT_HOST", help="Address to listen on.")]
Port = Annotated[int, typer.Option(envvar="HEFT_PORT", help="Port to listen on; 0: any free one.")]


def register(app: typer.Typer) -> None:
    for command in (up, demo, api, worker, migrate, doctor):
        app.command()(command)


def up(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    redis_url: Annotated[
        str | None, typer.Option(envvar="HEFT_REDIS_URL", help="A Redis or Valkey to use instead.")
    ] = None,
    artifacts_url: Annotated[
        str | None, typer.Option(envvar="HEFT_ARTIFACTS_URL", help="Artifact storage: file:///… or s3://…")
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(envvar="HEFT_MODEL_DIR", help="A folder of base models.")
    ] = None,
    trainers: Annotated[
        int,
        typer.Option(
            envvar="HEFT_TRAINERS", min=1, help="Jobs that train concurrently; they share the processors."
        ),
    ] = 1,
) -> None:
    """Run the whole service on this machine: database, broker, API and workers."""
    from cli.stack import up as stack
    from cli.stack.supervise import Interrupted, interruptible

    common = target(context)
    options = stack.UpOptions(
        host=host,
        port=port,
        api_key=common.api_key,
        database_url=common.database_url,
        redis_url=redis_url or None,
        artifacts_url=artifacts_url or None,
        model_dir=model_dir,
        trainers=trainers,
    )
    _print(f"starting in {common.home.path} …")
    try:
        with interruptible(), stack.up(common.home, options, _print) as (running, supervisor):
            _greet(running.url, common.api_key or stack.first_key(common.home), common.home.path)
            supervisor.watch()
    except Interrupted:
        _print("stopped; `heft up` continues with all data and jobs")


def demo(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 0,
) -> None:
    """Fine-tune a small language model end to end and query it: about ten minutes on two cores."""
    from cli.demo import run_demo

    run_demo(target(context), port)


def api(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    fd: Annotated[int | None, typer.Option(hidden=True, help="A listening socket.")] = None,
) -> None:
    """Run only the REST API, with HEFT_DATABASE_URL, HEFT_REDIS_URL and HEFT_ARTIFACTS_URL."""
    import socket

    import uvicorn

    from store import logs
    from store.settings import settings

    os.environ.update(_missing_settings(context) | {"HEFT_HOST": host})
    logs.configure(settings().log_format)
    # No access log: clients that poll a job would fill the disk.
    config = uvicorn.Config(
        "api.app:create_app",
        factory=True,
        http="api.door.connections:LimitedProtocol",
        ws="none",
        host=host,
        port=port,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    _allow_descriptors()
    # Not uvicorn's fd option, which expects a Unix socket and leaves Nagle's algorithm on.
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    uvicorn.Server(config).run(sockets=sockets)


def worker(context: typer.Context, role: Annotated[Role, typer.Argument(help="Its tasks.")]) -> None:
    """Run a worker, with HEFT_DATABASE_URL, HEFT_REDIS_URL and HEFT_ARTIFACTS_URL. There may be any number of them."""
    command = [sys.executable, "-P", "-m", "worker", role]
    os.execve(sys.executable, command, {**os.environ, **_missing_settings(context)})


def migrate(context: typer.Context) -> None:
    """Migrate the database to the current schema."""
    from cli.stack.database import database_of
    from migrations import upgrade

    options = target(context)
    with database_of(options.home, options.database_url) as url:
        upgrade(url)
    print("the database is up to date")


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every part of the service and give advice on problems; exit code 1 if there are any."""
    from dataclasses import asdict

    from cli import render
    from cli.doctor.checks import examine
    from cli.doctor.finding import State
    from cli.stack.up import running_stack
    from store.settings import StoreSettings

    settings = {
        name.lower().removeprefix("heft_"): value for name, value in _missing_settings(context).items()
    }
    common = target(context)
    stack = running_stack(common.home)
    url = common.url or (stack.url if stack is not None and not _has_all_urls() else None)
    findings = list(examine(StoreSettings(**settings), url))  # type: ignore[arg-type]
    is_ok = all(finding.state is not State.WRONG for finding in findings)
    if as_json:
        render.as_json({"ok": is_ok, "checks": [asdict(finding) for finding in findings]})
    else:
        rows = [(finding.state, finding.name, finding.found) for finding in findings]
        render.table(["", "check", "result"], rows)
        for finding in findings:
            if finding.advice:
                print(f"\n{finding.name}: {finding.advice}")
    raise typer.Exit(0 if is_ok else 1)


def _has_all_urls() -> bool:
    return all(os.environ.get(name) for name in _URLS)


def _missing_settings(context: typer.Context) -> dict[str, str]:
    """Returns settings that the environment lacks, from the stack that runs in the home."""
    from cli.stack.up import running_stack

    if _has_all_urls():
        return {}
    stack = running_stack(target(context).home)
    if stack is None:
        raise CommandError(f"set {', '.join(_URLS)}, or start `heft up` on this machine")
    return {name: value for name, value in stack.environment().items() if not os.environ.get(name)}


def _allow_descriptors() -> None:
    """Lets this process open as many connections as the system allows: shells often allow 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _print(message: str) -> None:
    print(message, flush=True)


def _greet(url: str, key: str, home: Path) -> None:
    _print(f"""
  HEFT is running

    address   {url}      (documentation: {url}/docs)
    key       {key}
    data      {home}

    export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}

  Ctrl-C stops it.
""")
