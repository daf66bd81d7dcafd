"""Commands that run the service: all of it on this machine, or one part of it."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import CommandError
from cli.options import target

#: Until an idle connection is closed. uvicorn's 5 seconds are also httpx's (the openai package's): now and then the
#: server closed a connection in the very moment in which a client asked on it again.
_KEEP_ALIVE_SECONDS = 75
_ADDRESSES = ("HEFT_DATABASE_URL", "HEFT_REDIS_URL", "HEFT_ARTIFACTS_URL")


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
        str | None, typer.Option(envvar="HEFT_ARTIFACTS_URL", help="Where bytes go: file:///… or s3://…")
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(envvar="HEFT_MODEL_DIR", help="A folder of base models to offer.")
    ] = None,
    trainers: Annotated[
        int,
        typer.Option(
            envvar="HEFT_TRAINERS", min=1, help="Jobs that train at a time; they share the processors."
        ),
    ] = 1,
) -> None:
    """Run the whole service on this machine: database, broker, API and workers."""
    from cli.stack import up as stack
    from cli.stack.supervise import Interrupted, interruptible

    chosen = target(context)
    options = stack.UpOptions(
        host=host,
        port=port,
        api_key=chosen.api_key,
        database_url=chosen.database_url,
        redis_url=redis_url or None,
        artifacts_url=artifacts_url or None,
        model_dir=model_dir,
        trainers=trainers,
    )
    _say(f"starting in {chosen.home.path} …")
    try:
        with interruptible(), stack.up(chosen.home, options, _say) as (running, supervisor):
            _greet(running.url, chosen.api_key or stack.first_key(chosen.home), chosen.home.path)
            supervisor.watch()
    except Interrupted:
        _say("stopped; everything is kept, `heft up` goes on from here")


def demo(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 0,
) -> None:
    """Fine-tune a small language model from start to end, and ask it: about ten minutes on two cores."""
    from cli.demo import run_demo

    run_demo(target(context), port)


def api(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    fd: Annotated[int | None, typer.Option(hidden=True, help="A socket that listens already.")] = None,
) -> None:
    """Run the REST API alone, on HEFT_DATABASE_URL, HEFT_REDIS_URL and HEFT_ARTIFACTS_URL."""
    import socket

    import uvicorn

    from store import logs
    from store.settings import settings

    os.environ.update(_addresses(context))
    logs.configure(settings().log_format)
    # No access log: one that watches a job would fill the disk with it.
    config = uvicorn.Config(
        "api.app:create_app",
        factory=True,
        host=host,
        port=port,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    # By hand: uvicorn takes a bare descriptor for a Unix socket, and leaves Nagle's delay on.
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    uvicorn.Server(config).run(sockets=sockets)


def worker(context: typer.Context, role: Annotated[Role, typer.Argument(help="What it does.")]) -> None:
    """Run one worker of as many as you like, on HEFT_DATABASE_URL, HEFT_REDIS_URL and HEFT_ARTIFACTS_URL."""
    command = [sys.executable, "-P", "-m", "worker", role]
    os.execve(sys.executable, command, {**os.environ, **_addresses(context)})


def migrate(context: typer.Context) -> None:
    """Bring the database's tables up to date."""
    from cli.stack.database import database_of
    from migrations import upgrade

    with database_of(target(context)) as url:
        upgrade(url)
    print("the database is up to date")


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at every part of the service and say what to do about what is wrong; exit code 1 if anything is."""
    from dataclasses import asdict

    from cli import render
    from cli.doctor.checks import examine
    from cli.doctor.finding import State
    from cli.stack.up import running_stack
    from store.settings import StoreSettings

    names = {name.lower().removeprefix("heft_"): value for name, value in _addresses(context).items()}
    chosen = target(context)
    stack = running_stack(chosen.home)
    url = chosen.url or (stack.url if stack is not None and not _own_servers() else None)
    findings = list(examine(StoreSettings(**names), url))  # type: ignore[arg-type]
    well = all(finding.state is not State.WRONG for finding in findings)
    if as_json:
        render.as_json({"ok": well, "checks": [asdict(finding) for finding in findings]})
    else:
        render.table(["", "what", "found"], [(one.state, one.name, one.found) for one in findings])
        for one in findings:
            if one.advice:
                print(f"\n{one.name}: {one.advice}")
    raise typer.Exit(0 if well else 1)


def _own_servers() -> bool:
    return all(os.environ.get(name) for name in _ADDRESSES)


def _addresses(context: typer.Context) -> dict[str, str]:
    """What the environment lacks of the service's settings, from the stack that runs in the home."""
    from cli.stack.up import running_stack

    if _own_servers():
        return {}
    stack = running_stack(target(context).home)
    if stack is None:
        raise CommandError(f"set {', '.join(_ADDRESSES)}, or start `heft up` on this machine")
    return {name: value for name, value in stack.environment().items() if not os.environ.get(name)}


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _greet(url: str, key: str, home: Path) -> None:
    _say(f"""
  HEFT is running

    address   {url}      (documentation: {url}/docs)
    key       {key}
    data      {home}

    export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}

  Ctrl-C stops it.
""")
