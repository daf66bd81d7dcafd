"""HEFT_HOME, the data folder of a machine: its layout, its permissions and its sockets.

api-key        the first key, mode 0600          artifacts/  bytes of files, checkpoints and models
heft.lock      lock of the running `heft up`     cache/      converted base models
stack.json     its URLs and folders              logs/       one file for each process
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

#: The home for root: Postgres runs as another user, who can't enter root's home directory.
SYSTEM_HOME = Path("/var/lib/heft")

#: A path that needs no escaping in a URL, and is short enough: a socket's path has at most 107 bytes, of which
#: `/postgres/.s.PGSQL.5432` needs some.
_URL_PATH = re.compile(rb"[A-Za-z0-9/._-]{1,80}")


def default_home() -> Path:
    """Returns the platform's user data folder; for root, a folder that other users can traverse."""
    if os.geteuid() == 0:
        return SYSTEM_HOME
    from platformdirs import user_data_path

    return user_data_path("heft", appauthor=False)


def server_user() -> User | None:
    """Returns the user to run Postgres as: `nobody` if this process is root's, else None (the same user)."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise CommandError(
            "Postgres can't run as root, and this machine has no user `nobody` to run it as: "
            "run heft as another user, or set HEFT_DATABASE_URL and HEFT_REDIS_URL"
        ) from None
    return User(uid=entry.pw_uid, gid=entry.pw_gid)


def can_traverse(path: Path, user: User | None) -> bool:
    """Returns whether `user` has search permission for all folders of `path`, including itself."""
    if user is None:
        return True
    resolved = path.resolve()
    folders = [*reversed(resolved.parents), *([resolved] if resolved.is_dir() else [])]
    return all(_has_search_permission(folder.stat(), user) for folder in folders)


def _has_search_permission(status: os.stat_result, user: User) -> bool:
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def make_private(path: Path, owner: User | None = None, *, traversable: bool = False) -> None:
    """Creates a folder that only its owner can use; `traversable`: others may traverse but not list it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owners = {os.geteuid(), owner.uid if owner else os.geteuid()}
        if path.is_symlink() or path.stat().st_uid not in owners:
            raise CommandError(
                f"{path} belongs to another user: remove it, or set HEFT_HOME to another folder"
            )
        path.chmod(0o711 if traversable else 0o700)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
    except OSError as error:
        raise CommandError(f"can't use {path}: {error.strerror}; set HEFT_HOME to another folder") from None


def make_home(path: Path) -> None:
    """Creates a private home; root's is traversable, for the user that Postgres runs as.

    An existing folder keeps its mode: it may be a home directory.
    """
    if not path.is_dir():
        make_private(path, traversable=os.geteuid() == 0)


@dataclass(frozen=True, kw_only=True)
class Home:
    """The paths in a HEFT_HOME. `occupied` creates the folders."""

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
        """The parent folder of the cluster, which may be a link (`_place_postgres`)."""
        return (self.path / "postgres").resolve()

    @property
    def run(self) -> Path:
        """The folder of the sockets: in the home, unless its path does not fit a URL or Postgres can't traverse it."""
        inside = self.path / "run"
        if _URL_PATH.fullmatch(os.fsencode(inside)) and can_traverse(self.path, server_user()):
            return inside
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:12]
        return Path(f"/tmp/heft-{os.geteuid()}-{digest}")

    @contextmanager
    def own(self) -> Iterator[None]:
        """Locks the home, so that one stack runs in it. Raises AlreadyRunning."""
        make_home(self.path)
        busy = f"`heft up` is already running in {self.path}: stop it, or set HEFT_HOME to another folder"
        with locked(self.path / "heft.lock", wait_seconds=0, busy=busy):
            yield

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Locks the home, creates its folders, and removes the sockets at the end. Servers are started in it only."""
        if sys.platform != "linux":
            raise CommandError(
                "this needs Linux; elsewhere, run `heft api` and `heft worker` with your own servers"
            )
        with self.own():
            self._prepare()
            try:
                yield
            finally:
                shutil.rmtree(self.run)

    def _prepare(self) -> None:
        """Creates all folders as private ones, and gives the user of Postgres access to its own."""
        user = server_user()
        make_home(self.path)
        for folder in (self.artifacts, self.cache, self.models, self.logs, self.valkey):
            make_private(folder)
        self._place_postgres(user)
        make_private(self.run, traversable=user is not None)

    def _place_postgres(self, user: User | None) -> None:
        """Creates the folder in the home; a link to /var/lib/heft if the user of Postgres can't enter the home."""
        inside = self.path / "postgres"
        if not inside.is_symlink() and not inside.exists() and not can_traverse(self.path, user):
            make_home(SYSTEM_HOME)
            outside = SYSTEM_HOME / f"postgres-{uuid.uuid4().hex}"
            make_private(outside, user)
            inside.symlink_to(outside)
        make_private(self.postgres, user)
        if not can_traverse(self.postgres, user):
            raise CommandError(
                f"Postgres runs as `nobody` when started by root, but `nobody` can't enter {self.postgres}: "
                f"run chmod o+x on its parent folders, or set HEFT_HOME to a folder such as {SYSTEM_HOME}"
            )
