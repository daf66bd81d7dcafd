"""The rendezvous of a run's ranks: how they find each other, and admit nobody who does not know the run's secret.

The environment has torchrun's variables and the secret. Ranks meet in a store that rank 0 serves over plain TCP. It
knows no passwords: whoever reaches the port can list, change and remove what is there. So each value, such as the
address of a rank, is sealed with a key that is derived from the secret and from a random number of every rank. A
changed value, and one of another run with the same secret, ends the run; so may a removed one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from heft_engine.config.run_file import LISTEN_FD, SECRET
from heft_engine.errors import ConfigError, RankLost
from heft_engine.runtime.distributed import FIRST_RANK_TIMEOUT, SINGLE_PROCESS, Ranks, first_line
from heft_engine.runtime.messages import SECRET_CHARACTERS, Authenticator, MessageChannel
from heft_engine.runtime.sealed_store import SealedStore

#: Longest time between the first and the last rank's start.
START_TIMEOUT = timedelta(minutes=10)
#: In the store, not sealed: rank 0's code of nothing, by which a rank sees that its secret differs.
_PROOF = "heft/rank 0 knows the secret"
_RANDOM_BYTES = 32
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", SECRET)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Yields the ranks that torchrun's environment variables describe; without them, a single process.

    Raises ConfigError for an incomplete environment, RankLost if the ranks don't find each other, and ForgedMessage if
    somebody else has written to their store.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is set, but {', '.join(missing)} is not. Start the ranks with --processes"
        )
    rank, local_rank, size, local_size = (int(os.environ[name]) for name in _VARIABLES[:4])
    of_secret = Authenticator(secret=checked_secret(os.environ[SECRET]))
    try:
        plain_store = _connect(rank)
        _check_secret(plain_store, of_secret, rank)
        authenticator = _of_this_run(plain_store, of_secret, rank, size)
        store = SealedStore(plain_store, authenticator)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=START_TIMEOUT)
        # A group of its own, because the first connection between machines must not wait for so long.
        control = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    except RuntimeError as error:
        message = f"rank {rank} of {size} did not find the others: {first_line(error)}"
        raise RankLost(message) from error
    yield Ranks(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        _control=control,
        _messages=MessageChannel(authenticator=authenticator, rank=rank, size=size, group=control),
        _store=store,
    )
    # Only after success: with a rank gone, it could wait for it.
    dist.destroy_process_group()


def checked_secret(secret: str) -> str:
    """Returns the secret of a run. Raises ConfigError for one that could be guessed."""
    if len(secret) < SECRET_CHARACTERS:
        message = (
            f"{SECRET} has {len(secret)} characters, and needs at least {SECRET_CHARACTERS}: take the output of "
            "`openssl rand -hex 32`, the same on every machine"
        )
        raise ConfigError(message, param="rendezvous")
    return secret


def _connect(rank: int) -> Store:
    """Returns the store in which the ranks find each other. Rank 0 serves it.

    Its own server would listen on every interface, at a port that may be taken by now; the process that has started the
    ranks listens already, and rank 0 takes over the socket.
    """
    store: Store
    descriptor = os.environ.get(LISTEN_FD)
    if descriptor is None:
        store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
    else:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            timeout=START_TIMEOUT,
            master_listen_fd=int(descriptor) if rank == 0 else None,
        )
    store.set_timeout(START_TIMEOUT)
    return store


def _check_secret(store: Store, authenticator: Authenticator, rank: int) -> None:
    """Raises ConfigError (wrong_secret) to a rank whose secret is not rank 0's, which goes on without it."""
    proof = authenticator.code(_PROOF, b"").hex()
    if rank == 0:
        store.set(_PROOF, proof)
    elif store.get(_PROOF) != proof.encode():
        message = (
            f"{SECRET} differs from that of rank 0, so this process is not admitted. Give every machine of the run the "
            "same secret, and make sure that rendezvous names machine 0 of this run"
        )
        raise ConfigError(message, param="rendezvous", code="wrong_secret")


def _of_this_run(store: Store, authenticator: Authenticator, rank: int, size: int) -> Authenticator:
    """Returns the authenticator of this run alone. Waits until all ranks are there. Raises ForgedMessage.

    A secret may serve for several runs. Messages of an earlier one are not authentic in this one, because the key
    depends on a random number of each rank: repeating those of the other ranks gives a key that no rank had before.
    """
    sealed = SealedStore(store, authenticator)
    numbers = {rank: secrets.token_bytes(_RANDOM_BYTES)}
    sealed.set(f"random number {rank}", numbers[rank])
    for other in set(range(size)) - {rank}:
        numbers[other] = sealed.get(f"random number {other}")
    parts = b"".join(numbers[each] for each in range(size))
    return Authenticator(secret=authenticator.code("random numbers of the ranks", parts).hex())
