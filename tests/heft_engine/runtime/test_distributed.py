"""Ranks: their environment variables, their devices, and what a single process exchanges."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from heft_engine.errors import ConfigError, TrainingError
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks, fingerprint, process_group


def test_without_variables_there_is_one_process_which_exchanges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as ranks:
        assert ranks is SINGLE_PROCESS
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    step = ranks.sum_gradients([parameter], torch.tensor([1.5, 3.0], dtype=torch.float64), stop=True)
    assert (step.sums, step.stop) == ([1.5, 3.0], True)
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))
    assert ranks.broadcast(lambda: "made") == "made"
    assert ranks.is_first_failure(ConfigError("no"))
    ranks.check_same("rows", "anything")


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK.*MASTER_PORT"), process_group():
        pass


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


def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(digests: list[str], mine: str, group: object) -> None:
        digests[:] = ["a", "a", mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    Ranks(rank=2, size=3).check_same("the training rows", "a")
    with pytest.raises(TrainingError, match="the training rows of rank 2 differ") as caught:
        Ranks(rank=2, size=3).check_same("the training rows", "b")
    assert caught.value.code == "ranks_differ"


def test_rank_0_tells_what_another_machine_failed_with() -> None:
    store = HashStore()
    first, second, third, fourth = (Ranks(rank=rank, size=4, local_size=2, _store=store) for rank in range(4))
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
    first, second = (Ranks(rank=rank, size=4, local_size=2, _store=store) for rank in (0, 1))
    assert second.is_first_failure(ConfigError("no"))
    assert first.failure_elsewhere() is None


def test_a_fingerprint_depends_on_every_bit_and_name() -> None:
    tensors = {"a": torch.zeros(2, 2), "b": torch.ones(3, dtype=torch.bfloat16)}
    changed = tensors["a"].clone()
    changed[1, 1] = 1e-45
    others = [{**tensors, "a": changed}, {"a": tensors["a"], "c": tensors["b"]}]
    assert fingerprint(tensors) == fingerprint({name: tensor.clone() for name, tensor in tensors.items()})
    assert len({fingerprint(each) for each in [tensors, *others]}) == 3
