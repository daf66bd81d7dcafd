"""A cache's plan: its place, the ledger that its bytes count in, and its JSON."""

from __future__ import annotations

import pytest
import torch

from heft_engine.config.flops import CacheLevel
from heft_engine.training.memory.cache_plan import CachePlace, CachePlan

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("place", CachePlace)
def test_a_plan_survives_its_json(place: CachePlace) -> None:
    plan = CachePlan(level=CacheLevel.KV, place=place, bytes=7)
    assert CachePlan.from_json(plan.to_json()) == plan


def test_a_checkpoint_without_a_place_says_whether_its_cache_was_on_disk() -> None:
    values = {"rung": "states", "bytes": 7}
    assert CachePlan.from_json({**values, "on_disk": False}).place == CachePlace.HOST
    assert CachePlan.from_json({**values, "on_disk": True}).place == CachePlace.DISK


def test_bytes_count_in_the_ledger_of_their_place() -> None:
    host = CachePlan(level=CacheLevel.HIDDEN_STATES, bytes=7)
    assert (host.bytes_on(CPU), host.bytes_on(GPU)) == (7, 0)
    disk = CachePlan(level=CacheLevel.HIDDEN_STATES, place=CachePlace.DISK, bytes=7)
    assert (disk.bytes_on(CPU), disk.bytes_on(GPU)) == (0, 0)
