"""Runs of the engine in several gloo processes, which are started once for many runs."""

from __future__ import annotations

import os
import pickle
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_runs import RunRecord, parse, run, yes_no

from heft_engine.config.run_file import SECRET
from heft_engine.config.train import TrainConfig
from heft_engine.errors import ForgedMessage, Stopped, TrainingError
from heft_engine.model.loss import LossSums
from heft_engine.runtime.distributed import Ranks
from heft_engine.runtime.messages import Authenticator
from heft_engine.runtime.rendezvous import process_group
from heft_engine.training import loop
from heft_engine.training.stage_store import LocalStages

VALIDATION = parse(yes_no(7, seed=1))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of all ranks. stop_after: steps after which the last rank, and no other, is asked to stop."""

    name: str
    config: TrainConfig
    rows: int = 22
    stop_after: int | None = None
    out_of_memory: bool = False  #: the last rank, and no other, runs out of memory once
    overflows: bool = False  #: the gradients of the last rank, and no other, overflow in one pass
    reuses_stages: bool = False  #: of earlier runs in the same folder
    resume_from: str | None = None  #: the run whose last checkpoint it continues
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, folder: Path, **more: Any) -> RunRecord:
        """Trains in this process, or as one of several ranks."""
        return run(
            self.config, folder / self.name, parse(yes_no(self.rows)), VALIDATION, **more, **self.options
        )


def run_in_ranks(size: int, folder: Path, runs: Sequence[Run]) -> dict[str, list[RunRecord]]:
    """Runs them one after the other in `size` processes. Returns each rank's record, by the run's name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    secret = secrets.token_hex(32)
    torch.multiprocessing.spawn(_run_rank, (size, port, secret, folder, runs), nprocs=size)
    return {
        each.name: [pickle.loads((folder / f"{each.name}-{rank}").read_bytes()) for rank in range(size)]
        for each in runs
    }


def run_out_of_memory_once() -> None:
    """Makes the next training pass of this process fail for lack of memory."""
    loss_sums = loop.loss_sums

    def fail(*_: Any) -> Any:
        loop.loss_sums = loss_sums
        raise torch.OutOfMemoryError

    loop.loss_sums = fail


def overflow_later() -> None:
    """Makes the loss of the sixth training pass of this process too large for finite gradients."""
    loss_sums, passes = loop.loss_sums, iter(range(1, 1_000))

    def enlarge(*arguments: Any) -> Any:
        loss, correct = loss_sums(*arguments)
        if next(passes) < 6:
            return LossSums(loss, correct)
        loop.loss_sums = loss_sums
        return LossSums(loss * 1e38, correct)

    loop.loss_sums = enlarge


class Hostile:
    """An object that creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _run_rank(rank: int, size: int, port: int, secret: str, folder: Path, runs: Sequence[Run]) -> None:
    torch.set_num_threads(1)
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", SECRET: secret}
    os.environ.update({name: str(value) for name, value in (sizes | address).items()})
    with process_group() as ranks:
        for each in runs:
            record = RunRecord()
            steps = iter(range(1, 1_000))

            def should_stop(each: Run = each, steps: Any = steps) -> bool:
                return next(steps) == each.stop_after and rank == size - 1

            resume = None if each.resume_from is None else folder / f"{each.resume_from}-checkpoints"
            if resume is not None and rank == 0:  # which alone reads it
                resume = max(resume.iterdir())
            if each.out_of_memory and rank == size - 1:
                run_out_of_memory_once()
            if each.overflows and rank == size - 1:
                overflow_later()
            # A resumed process starts with another random state.
            torch.manual_seed(1_000 + rank)
            with suppress(Stopped):
                each.start(
                    folder,
                    record=record,
                    ranks=ranks,
                    should_stop=should_stop,
                    resume=resume,
                    stage_store=LocalStages(directory=folder / "stages") if each.reuses_stages else None,
                    checkpoint_dir=folder / f"{each.name}-checkpoints",
                )
            (folder / f"{each.name}-{rank}").write_bytes(pickle.dumps(record))
        if ranks.is_first_failure(TrainingError("no")):
            (folder / f"first-failure-{rank}").touch()
        errors = [_forged_error(ranks, message) for message in forged_messages(folder)]
        (folder / f"forged-{rank}").write_bytes(pickle.dumps(errors))


def forged_messages(folder: Path) -> list[bytes]:
    """Returns messages that a stranger might send in the place of rank 0."""
    hostile = pickle.dumps(Hostile(folder / "was unpickled"))
    guessed = Authenticator(secret="a guess, which is wrong" * 2)
    return [hostile, guessed.seal("broadcast 1", hostile), bytes(40), b"\xff" * 40]


def _forged_error(ranks: Ranks, message: bytes) -> str | None:
    """Returns the code of the error with which a rank meets a message that rank 0 has not sealed. None to rank 0."""
    channel = ranks._messages
    assert channel is not None
    if not ranks.is_first:
        try:
            ranks.receive()
        except ForgedMessage as error:
            return error.code
        return None
    header = bytearray(message[:40].ljust(40, b"\0"))
    dist.broadcast(torch.frombuffer(header, dtype=torch.uint8), src=0, group=channel.group)
    channel.count += 1
    return None
