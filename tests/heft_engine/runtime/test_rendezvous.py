"""The rendezvous of ranks: a complete environment, a secret that can't be guessed, and nobody who lacks it."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from engine_processes.ranks import Hostile
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from heft_engine.config.run_file import SECRET
from heft_engine.errors import ConfigError
from heft_engine.runtime import rendezvous
from heft_engine.runtime.messages import Authenticator
from heft_engine.runtime.rendezvous import process_group

KNOWN, OTHER = "k" * 64, "o" * 64


def set_environment(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """Sets the variables of rank 1 of 2."""
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", SECRET: KNOWN}
    for name, value in (variables | address | changes).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store() -> Iterator[TCPStore]:
    """The store that rank 0 serves."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            timeout=timedelta(seconds=30),
            wait_for_workers=False,
            master_listen_fd=server.detach(),
        )


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    for name in ("RANK", "MASTER_PORT", SECRET):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=rf"RANK.*MASTER_PORT.*{SECRET}"), process_group():
        pass


def test_a_secret_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, **{SECRET: "hunter2"})
    with pytest.raises(ConfigError, match="at least 32") as caught, process_group():
        pass
    assert caught.value.param == "rendezvous"
    assert "hunter2" not in caught.value.message


def test_a_rank_with_another_secret_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, store: TCPStore
) -> None:
    hidden = rendezvous._hidden(store, Authenticator(secret=KNOWN), 0)
    hidden.set("of rank 0", "here")
    names = store.list_keys()
    set_environment(monkeypatch, **{SECRET: OTHER, "MASTER_PORT": str(store.port)})
    with pytest.raises(ConfigError, match="differs from that of rank 0") as caught, process_group():
        pass
    assert (caught.value.code, caught.value.param) == ("wrong_secret", "rendezvous")
    assert store.list_keys() == names
    assert hidden.get("of rank 0") == b"here"


def test_a_stranger_meets_other_names_in_the_store(store: TCPStore, tmp_path: Path) -> None:
    hidden = rendezvous._hidden(store, Authenticator(secret=KNOWN), 0)
    stranger = TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
    hostile = pickle.dumps(Hostile(tmp_path / "was unpickled")).hex()
    for name in ("failure", "failures", "heft/failure", f"{'0' * 64}/failure"):
        stranger.set(name, hostile)
    assert not hidden.check(["failure"])
    assert hidden.add("failures", 1) == 1
    with socket.create_connection(("127.0.0.1", store.port)) as connection:
        connection.sendall(pickle.dumps(Hostile(tmp_path / "was unpickled")) * 100)
    hidden.set("of rank 0", "here")
    assert hidden.get("of rank 0") == b"here", "the store goes on"
    assert not (tmp_path / "was unpickled").exists()
