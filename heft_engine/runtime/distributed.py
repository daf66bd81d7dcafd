"""The processes ("ranks") of one data-parallel run, and everything that they exchange.

There is no wrapper around the model. Every rank knows the rows of every optimizer step, runs its share of them and adds
its gradients to those of the others, so that all take the same optimizer step. Gradients go through NCCL on GPUs and
gloo on CPUs; all else goes through gloo. Values and files are authenticated (heft_engine.runtime.messages); gradients
and sums are not. heft_engine.runtime.rendezvous brings the ranks together.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heft_engine.errors import (
    ConfigError,
    EngineError,
    FailedElsewhere,
    ForgedMessage,
    RankLost,
    TrainingError,
)
from heft_engine.runtime.devices import choose_device
from heft_engine.runtime.messages import (
    MessageChannel,
    file_list,
    file_parts,
    part_lengths,
)
from heft_engine.runtime.out_of_memory import is_out_of_memory
from heft_engine.runtime.sealed_store import SealedStore

#: Longest wait for the gradients of the other ranks: rank 0 may be writing a checkpoint. Only a rank that hangs, or
#: whose machine is gone, is noticed by this; the end of a process closes its connections.
STEP_TIMEOUT = timedelta(minutes=30)
#: Longest wait for rank 0, which evaluates alone.
FIRST_RANK_TIMEOUT = timedelta(days=2)
#: Whole multiples of 1/64 have an exact sum in float32 up to 2¹⁸.
_FIGURE_PARTS = 64
#: In the store: the error of the first rank that has failed.
_FAILURE = "failure"


@dataclass(frozen=True, kw_only=True)
class StepSum:
    """A step's sums over all ranks, of each figure. stop: a rank was asked to stop."""

    sums: list[float]
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, seen from one of them. All of them make the same calls in the same order.

    Every exchange may raise RankLost: another rank has ended or does not answer; those of values and files
    ForgedMessage: they were not sent by a rank of this run. A single process exchanges nothing.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  #: the rank among those of this machine, and the number of its GPU
    local_size: int = 1
    device: str | None = None  #: of this rank; None: not chosen yet
    _control: dist.ProcessGroup | None = field(default=None, repr=False)  #: for all but gradients
    _gradients: dist.ProcessGroup | None = field(default=None, repr=False)
    _messages: MessageChannel | None = field(default=None, repr=False)  #: None: of a single process
    _store: SealedStore | None = field(default=None, repr=False)  #: in which the ranks have met

    @property
    def is_first(self) -> bool:
        """True for rank 0, which alone evaluates, emits events and writes files."""
        return self.rank == 0

    def on_device(self, requested: str | None) -> Ranks:
        """Returns these ranks, each on its device: the GPU with the number of its local rank, or the CPU.

        Raises ConfigError for a device that several ranks can't use, and for more ranks than GPUs.
        """
        if self.size == 1:
            return replace(self, device=requested)
        device = _rank_device(requested, self.local_rank, self.local_size)
        self.sum(torch.zeros(1))  # however long others take to download the model
        backend = "gloo"
        if device != "cpu":
            torch.cuda.set_device(self.local_rank)
            backend = "nccl"
            # Else a thread of NCCL's group asks the store each second whether to write a trace. The store is Python's,
            # and a thread that calls Python while the interpreter ends may end the process with a signal.
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        with self._exchange():
            group = dist.new_group(backend=backend, timeout=STEP_TIMEOUT)
        return replace(self, device=device, _gradients=group)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], figures: Tensor, *, stop: bool) -> StepSum:
        """Replaces the gradients by their sums over all ranks, and returns the sums of the figures.

        figures: (n,) in float64, on the parameters' device. Gradients, figures and `stop` travel in one flat float32
        buffer, so that a step costs one exchange.
        """
        if self.size == 1:
            return StepSum(sums=figures.tolist(), stop=stop)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # In two parts, whose sums lose no digit that matters: float32 alone would round a loss of 100 by 4e-6.
        coarse = (figures * _FIGURE_PARTS).round() / _FIGURE_PARTS
        extra = torch.cat([coarse, figures - coarse, torch.full_like(figures[:1], float(stop))]).float()
        buffer = torch.cat([*(gradient.reshape(-1) for gradient in gradients), extra])
        with self._exchange():
            dist.all_reduce(buffer, group=self._gradients)
            # NCCL fails where its result is read.
            *halves, stops = buffer[-len(extra) :].tolist()
        parts = torch.split(buffer[: -len(extra)], [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        sums = [
            coarse + rest for coarse, rest in zip(halves[: len(figures)], halves[len(figures) :], strict=True)
        ]
        return StepSum(sums=sums, stop=stops > 0)

    def sum(self, figures: Tensor) -> list[float]:
        """Returns the sums of (n,) figures over all ranks, in float64, with the same bits on each."""
        total = figures.to("cpu", torch.float64)
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(total, group=self._control)
        sums: list[float] = total.tolist()
        return sums

    def check_same(self, name: str, digest: str) -> None:
        """Raises TrainingError (ranks_differ) on every rank unless all have the same digest, of any length."""
        if self.size == 1:
            return
        with self._exchange():
            # Hashed once more: what is gathered has the same length on every rank, and a digest may be empty.
            digests = self._channel.gather(hashlib.sha256(digest.encode()).digest())
        for rank, other in enumerate(digests):
            if other != digests[0]:
                message = (
                    f"{name} of rank {rank} differ from those of rank 0. Start every rank with the same run file, rows "
                    "and base model, on machines of one kind"
                )
                raise TrainingError(message, code="ranks_differ")

    def send(self, value: Any) -> None:
        """Sends a JSON value from rank 0 to the others, which call `receive`."""
        if self.size > 1:
            payload = json.dumps(value).encode()
            with self._exchange():
                self._channel.send(payload)

    def receive(self) -> Any:
        """Returns the JSON value that rank 0 sends, however long it takes until it does."""
        with self._exchange():
            payload = self._channel.receive()
        return json.loads(payload)

    @contextmanager
    def shared_directory(self, path: Path | None) -> Iterator[Path | None]:
        """Yields `path` to rank 0, and to the others a copy of that directory, which is there until the block ends.

        path: rank 0's; None: there is none, on any rank. The other ranks' argument does not count.
        """
        if self.is_first:
            self._send_directory(path)
            yield path
            return
        files = self.receive()
        if files is None:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="heft-rank-") as copy:
            self._receive_files(files, Path(copy))
            yield Path(copy)

    def _send_directory(self, path: Path | None) -> None:
        if self.size == 1:
            return
        files = None if path is None else file_list(path)
        self.send(files)
        for file in files or ():
            assert path is not None
            for part in file_parts(path / file["path"], file["bytes"]):
                with self._exchange():
                    self._channel.send(part)

    def _receive_files(self, files: Sequence[Mapping[str, Any]], directory: Path) -> None:
        for file in files:
            path = directory / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                for _ in part_lengths(file["bytes"]):
                    with self._exchange():
                        part = self._channel.receive()
                    out.write(part)

    @property
    def _channel(self) -> MessageChannel:
        assert self._messages is not None, "several ranks have a channel"
        return self._messages

    def is_first_failure(self, error: EngineError) -> bool:
        """Returns True to the first rank of each machine that fails: the one that tells its machine why.

        The first of all stores the error for the other machines.
        """
        if self._store is None:
            return True
        try:
            is_first_here = int(self._store.add(f"failures/{self.rank // self.local_size}", 1)) == 1
            if int(self._store.add("failures", 1)) == 1:
                failure = {
                    "rank": self.rank,
                    "code": error.code,
                    "message": error.message,
                    "param": error.param,
                }
                self._store.set(_FAILURE, json.dumps(failure))
        except RuntimeError:  # the store ended with rank 0: nobody else can have told
            return True
        return is_first_here

    def failure_elsewhere(self) -> FailedElsewhere | None:
        """Returns why a rank on another machine has failed; None to all ranks but the first, which tells it."""
        if not self.is_first or self._store is None:
            return None
        try:
            if not self._store.check([_FAILURE]):
                return None
            failure = json.loads(self._store.get(_FAILURE))
        except (RuntimeError, ForgedMessage):  # the store has gone, or a stranger has written there
            return None
        if failure["rank"] < self.local_size:
            return None  # on this machine, it has told by itself
        return FailedElsewhere(failure["message"], code=failure["code"], param=failure["param"])

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors derive from it
            if is_out_of_memory(error):
                raise
            message = (
                f"rank {self.rank} of {self.size} has lost another process of its run: {first_line(error)}"
            )
            raise RankLost(message) from error


SINGLE_PROCESS = Ranks()


def _rank_device(requested: str | None, local_rank: int, local_size: int) -> str:
    """Returns the device of a rank. Raises ConfigError for one that several ranks can't use."""
    device = choose_device(requested)
    if device not in ("cpu", "cuda"):
        message = (
            f"device {device!r} does not fit a run of several processes: each takes one GPU, and none spreads its "
            "model over several. Leave device out, or choose cpu or cuda"
        )
        raise ConfigError(message, param="device")
    if device == "cpu":
        return device
    if local_size > torch.cuda.device_count():
        message = (
            f"processes: {local_size} processes need a GPU each, and {torch.cuda.device_count()} can be seen here. "
            "Lower it, or look at CUDA_VISIBLE_DEVICES"
        )
        raise ConfigError(message, param="processes")
    return f"cuda:{local_rank}"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of named tensors' bytes."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message; its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
