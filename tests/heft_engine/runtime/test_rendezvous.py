"""The rendezvous of ranks: a complete environment, a secret that can't be guessed, and nobody who lacks it."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from engine_processes.ranks import Hostile
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from heft_engine.config.run_file import SECRET
from heft_engine.errors import ConfigError, ForgedMessage
from heft_engine.runtime import rendezvous
from heft_engine.runtime.messages import Authenticator
from heft_engine.runtime.rendezvous import process_group
from heft_engine.runtime.sealed_store import SealedStore

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
    rendezvous._check_secret(store, Authenticator(secret=KNOWN), 0)
    names = store.list_keys()
    set_environment(monkeypatch, **{SECRET: OTHER, "MASTER_PORT": str(store.port)})
    with pytest.raises(ConfigError, match="differs from that of rank 0") as caught, process_group():
        pass
    assert (caught.value.code, caught.value.param) == ("wrong_secret", "rendezvous")
    assert store.list_keys() == names


def test_bytes_of_a_stranger_do_not_end_the_store(store: TCPStore, tmp_path: Path) -> None:
    hostile = pickle.dumps(Hostile(tmp_path / "was unpickled"))
    with socket.create_connection(("127.0.0.1", store.port)) as connection:
        connection.sendall(hostile * 100)
    sealed = SealedStore(store, Authenticator(secret=KNOWN))
    sealed.set("of rank 0", "here")
    assert sealed.get("of rank 0") == b"here", "the store goes on"
    assert not (tmp_path / "was unpickled").exists()


def meet(store: Store, ranks: Sequence[int] = (0, 1, 2)) -> list[Authenticator]:
    """Returns the authenticators of these ranks of three, who meet in the store."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        of_secret = Authenticator(secret=KNOWN)
        return list(pool.map(lambda rank: rendezvous._of_this_run(store, of_secret, rank, 3), ranks))


def test_ranks_of_a_run_authenticate_each_other_and_no_message_of_another_run_with_this_secret() -> None:
    first, *others = meet(HashStore())
    assert others == [first, first]
    sealed = first.seal("broadcast 1", b"value")
    later = meet(HashStore())[0]
    for authenticator in (later, Authenticator(secret=KNOWN)):
        with pytest.raises(ForgedMessage):
            authenticator.open("broadcast 1", sealed)


def test_random_numbers_that_are_repeated_give_no_earlier_key() -> None:
    """A stranger has recorded a run, and writes what all ranks but one have sent into the store of the next."""
    recorded = HashStore()
    earlier = meet(recorded)[0]
    store = HashStore()
    for name in ("random number 0", "random number 1", "random number 2"):
        store.set(name, recorded.get(name).decode())
    assert meet(store, ranks=[2]) != [earlier]


def test_a_random_number_of_a_stranger_is_forged() -> None:
    store = HashStore()
    for name in ("random number 0", "random number 1"):
        store.set(name, "ab" * 64)
    with pytest.raises(ForgedMessage):
        meet(store, ranks=[2])
