"""Ranks: their environment variables, their devices, and what a single process exchanges."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from engine_processes.ranks import Hostile
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from heft_engine.errors import ConfigError, TrainingError
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks, fingerprint
from heft_engine.runtime.messages import Authenticator, MessageChannel
from heft_engine.runtime.rendezvous import process_group
from heft_engine.runtime.sealed_store import SealedStore

AUTHENTICATOR = Authenticator(secret="s" * 64)


def test_without_variables_there_is_one_process_which_exchanges_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as ranks:
        assert ranks is SINGLE_PROCESS
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    step = ranks.sum_gradients([parameter], torch.tensor([1.5, 3.0], dtype=torch.float64), stop=True)
    assert (step.sums, step.stop) == ([1.5, 3.0], True)
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))
    ranks.send("a value")
    with ranks.shared_directory(tmp_path) as directory:
        assert directory == tmp_path
    assert ranks.is_first_failure(ConfigError("no"))
    ranks.check_same("rows", "anything")


@pytest.mark.parametrize(
    ("requested", "param"), [("auto", "device"), ("cuda:1", "device"), ("cuda", "processes")]
)
def test_each_of_several_ranks_takes_one_gpu(
    monkeypatch: pytest.MonkeyPatch, requested: str, param: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError) as caught:
        Ranks(rank=2, size=3, local_rank=2, local_size=3).on_device(requested)
    assert caught.value.param == param


def test_what_the_operator_says_of_devices_holds_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("HEFT_DEVICE", "cuda:1")
    with pytest.raises(ConfigError, match="cuda:1"):
        Ranks(rank=0, size=2, local_size=2).on_device(None)


def test_a_single_process_keeps_the_device_that_is_requested() -> None:
    assert SINGLE_PROCESS.on_device("auto").device == "auto"


class Sending(MessageChannel):
    """A channel in which all ranks but this one have sent these payloads."""

    others: ClassVar[list[bytes]] = []

    def gather(self, payload: bytes) -> list[bytes]:
        assert {len(other) for other in self.others} == {len(payload)}, "gloo aborts on unequal lengths"
        return [*self.others, payload]


def channel(rank: int, size: int, kind: type[MessageChannel] = MessageChannel) -> MessageChannel:
    return kind(authenticator=AUTHENTICATOR, rank=rank, size=size, group=None)


@pytest.mark.parametrize("digest", ["b", "", "b" * 64])
def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    monkeypatch.setattr(Sending, "others", [hashlib.sha256(b"a").digest()] * 2)
    ranks = Ranks(rank=2, size=3, _messages=channel(2, 3, Sending))
    ranks.check_same("the training rows", "a")
    with pytest.raises(TrainingError, match="the training rows of rank 2 differ") as caught:
        ranks.check_same("the training rows", digest)
    assert caught.value.code == "ranks_differ"


def of_two_machines(store: Store, rank: int) -> Ranks:
    """One of four ranks on two machines."""
    sealed = SealedStore(store, AUTHENTICATOR)
    return Ranks(rank=rank, size=4, local_size=2, _store=sealed, _messages=channel(rank, 4))


def test_rank_0_tells_what_another_machine_failed_with() -> None:
    store = HashStore()
    first, second, third, fourth = (of_two_machines(store, rank) for rank in range(4))
    assert first.failure_elsewhere() is None
    assert third.is_first_failure(ConfigError("too large", param="max_length", code="out_of_memory"))
    assert not fourth.is_first_failure(ConfigError("later")), "its machine has been told"
    failure = first.failure_elsewhere()
    assert failure is not None
    assert (failure.code, failure.message, failure.param) == ("out_of_memory", "too large", "max_length")
    assert second.failure_elsewhere() is None, "one rank tells"
    assert second.is_first_failure(ConfigError("the same on this machine")), "each machine is told"
    assert not first.is_first_failure(ConfigError("later"))


def test_a_failure_on_this_machine_is_told_by_its_rank() -> None:
    store = HashStore()
    first, second = (of_two_machines(store, rank) for rank in (0, 1))
    assert second.is_first_failure(ConfigError("no"))
    assert first.failure_elsewhere() is None


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps(Hostile(Path("/nowhere"))).hex(),
        '{"rank": 3, "code": "x", "message": "m", "param": null}',
        Authenticator(secret="a guess" * 5).seal("store failure", b'{"rank": 3}').hex(),
        "",
    ],
)
def test_a_failure_that_a_stranger_has_written_is_not_told(value: str) -> None:
    store = HashStore()
    store.set("failure", value)
    assert of_two_machines(store, 0).failure_elsewhere() is None


def test_a_fingerprint_depends_on_every_bit_and_name() -> None:
    tensors = {"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    changed = tensors["a"].clone()
    changed[1, 1] = 1e-45
    others = [{**tensors, "a": changed}, {"a": tensors["a"], "c": tensors["b"]}]
    assert fingerprint(tensors) == fingerprint({name: tensor.clone() for name, tensor in tensors.items()})
    assert len({fingerprint(each) for each in [tensors, *others]}) == 3
