"""Work that runs out of memory is done in smaller pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from heft_engine.errors import OutOfMemory
from heft_engine.runtime import out_of_memory
from heft_engine.runtime.device_failure import is_device_failure
from heft_engine.runtime.out_of_memory import is_out_of_memory, run_in_halves

CPU = torch.device("cpu")
LACKS = [
    MemoryError(),
    torch.OutOfMemoryError("no room"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices whose memory was freed: collecting a test session's garbage takes a while."""
    devices: list[torch.device] = []
    monkeypatch.setattr(out_of_memory, "free_memory", devices.append)
    return devices


def fitting(limit: int, error: Exception) -> tuple[list[list[int]], list[int]]:
    """Returns the parts of ten numbers that are worked on with room for `limit` of them, and the sizes of all tries."""
    tries: list[int] = []

    def work(part: Sequence[int]) -> list[int]:
        tries.append(len(part))
        if len(part) > limit:
            raise error
        return list(part)

    return run_in_halves(work, range(10), CPU), tries


@pytest.mark.parametrize("error", LACKS, ids=repr)
def test_work_is_halved_until_it_fits(error: Exception, freed: list[torch.device]) -> None:
    assert is_out_of_memory(error)
    assert not is_device_failure(error)
    assert fitting(10, error) == ([list(range(10))], [10])
    assert fitting(4, error) == ([[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]], [10, 5, 2, 3, 5, 2, 3])
    assert freed == [CPU] * 3, "once for each part that failed"
    with pytest.raises(OutOfMemory, match="one row alone") as failed:
        fitting(0, error)
    assert failed.value.code == "out_of_memory"


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("CUDA error: illegal address")])
def test_another_error_is_raised_at_once(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        fitting(4, error)
