"""HEFT_HOME: where a single machine keeps its data, who may enter it, and where the sockets go.

It does NOT start anything. Layout:

    api-key        the first key, mode 0600          artifacts/  bytes of files, checkpoints and models
    heft.lock      held by the running `heft up`     cache/      converted base models
    stack.json     address and process of it         logs/       one file for each process
    postgres/      cluster, owned by its own user    models/     default HEFT_MODEL_DIR
    valkey/        append-only file                  run/        sockets
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.errors import CommandError
from cli.stack.process import User, locked

#: Postgres refuses to run as root, and its user must be able to walk to its files; root's home is closed.
SYSTEM_HOME = Path("/var/lib/heft")

#: A path that reads the same inside a URL, whoever takes that apart, and leaves room for a socket's name: a
#: socket's path ends at 107 bytes, and `/postgres/.s.PGSQL.5432` is added to the run directory.
_URL_PATH = re.compile(rb"[A-Za-z0-9/._-]{1,80}")


def default_home() -> Path:
    """The platform's user data folder; a folder that other users can walk through when we are root."""
    if os.geteuid() == 0:
        return SYSTEM_HOME
    from platformdirs import user_data_path

    return user_data_path("heft", appauthor=False)


def server_user() -> User | None:
    """Whom Postgres runs as: `nobody` when we are root, else we ourselves (None)."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise CommandError(
            "Postgres does not run as root and this machine has no user `nobody` to run it as: "
            "start heft as an ordinary user, or set HEFT_DATABASE_URL and HEFT_REDIS_URL"
        ) from None
    return User(uid=entry.pw_uid, gid=entry.pw_gid)


def can_walk_to(path: Path, user: User | None) -> bool:
    """Whether `user` may pass every folder on the way to `path`, and enter `path` itself if it is one."""
    if user is None:
        return True
    resolved = path.resolve()
    folders = [*reversed(resolved.parents), *([resolved] if resolved.is_dir() else [])]
    return all(_may_pass(folder.stat(), user) for folder in folders)


def _may_pass(status: os.stat_result, user: User) -> bool:
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def make_private(path: Path, owner: User | None = None, *, passable: bool = False) -> None:
    """A folder of ours that only its owner can use; `passable`: others may walk through but not list it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_symlink() or path.stat().st_uid not in {
            os.geteuid(),
            owner.uid if owner else os.geteuid(),
        }:
            raise CommandError(
                f"{path} belongs to somebody else: remove it, or set HEFT_HOME to another folder"
            )
        path.chmod(0o711 if passable else 0o700)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
    except OSError as error:
        raise CommandError(f"cannot use {path}: {error.strerror}; set HEFT_HOME to another folder") from None


def make_home(path: Path) -> None:
    """A new home is closed, but for root others may walk through it to the server's own folders.

    One that stands already keeps its mode: it may be somebody's home directory.
    """
    if not path.is_dir():
        make_private(path, passable=os.geteuid() == 0)


@dataclass(frozen=True, kw_only=True)
class Home:
    """One HEFT_HOME. Paths only; `occupied` makes the folders."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> Home:
        return cls(path=path.expanduser().absolute())

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def valkey(self) -> Path:
        return self.path / "valkey"

    @property
    def key_file(self) -> Path:
        return self.path / "api-key"

    @property
    def state_file(self) -> Path:
        return self.path / "stack.json"

    @property
    def postgres(self) -> Path:
        """The folder around the cluster; see `_place_postgres` for when it is a link."""
        return (self.path / "postgres").resolve()

    @property
    def run(self) -> Path:
        """Where the sockets go: inside, unless no socket's URL could say so or the server's user can't go there."""
        inside = self.path / "run"
        if _URL_PATH.fullmatch(os.fsencode(inside)) and can_walk_to(self.path, server_user()):
            return inside
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:12]
        return Path(f"/tmp/heft-{os.geteuid()}-{digest}")

    @contextmanager
    def own(self) -> Iterator[None]:
        """One running stack for each home. Raises AlreadyRunning."""
        make_home(self.path)
        busy = f"a stack is already running in {self.path}; stop it first, or set HEFT_HOME to another folder"
        with locked(self.path / "heft.lock", wait_seconds=0, busy=busy):
            yield

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """`own` with every folder made, and no socket left behind. Only here may servers be started."""
        if sys.platform != "linux":
            raise CommandError(
                "this needs Linux; run `heft api` and `heft worker` on servers of your own instead"
            )
        with self.own():
            self._prepare()
            try:
                yield
            finally:
                shutil.rmtree(self.run)

    def _prepare(self) -> None:
        """Make every folder, private to us; the server's user gets a way to its own."""
        user = server_user()
        make_home(self.path)
        for folder in (self.artifacts, self.cache, self.models, self.logs, self.valkey):
            make_private(folder)
        self._place_postgres(user)
        make_private(self.run, passable=user is not None)

    def _place_postgres(self, user: User | None) -> None:
        """In the home; a link to /var/lib/heft where the server's user can't walk into the home."""
        inside = self.path / "postgres"
        if not inside.is_symlink() and not inside.exists() and not can_walk_to(self.path, user):
            make_home(SYSTEM_HOME)
            outside = SYSTEM_HOME / f"postgres-{uuid.uuid4().hex}"
            make_private(outside, user)
            inside.symlink_to(outside)
        make_private(self.postgres, user)
        if not can_walk_to(self.postgres, user):
            raise CommandError(
                f"Postgres runs as `nobody` when started by root, who cannot enter {self.postgres}: "
                f"open the folders above it (chmod o+x), or set HEFT_HOME to a folder such as {SYSTEM_HOME}"
            )
