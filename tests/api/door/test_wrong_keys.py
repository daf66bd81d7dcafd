"""Tries of wrong keys: a bucket for each address that refills, in bounded memory."""

from __future__ import annotations

import pytest
from clock import Clock

from api.door import wrong_keys
from api.door.addresses import counted_address
from api.door.wrong_keys import WrongKeys
from store.errors import RateLimited

A, B = "203.0.113.1", "203.0.113.2"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tries(clock: Clock) -> WrongKeys:
    return WrongKeys(per_minute=6, clock=clock)


def test_tries_refill_with_time(tries: WrongKeys, clock: Clock) -> None:
    for number in range(6):
        tries.check(A, f"k{number}")
        tries.wrong(A, f"k{number}")
    with pytest.raises(RateLimited) as refusal:
        tries.check(A, "k")
    assert refusal.value.retry_after == 10
    tries.check(B, "k")
    clock.now += 10
    tries.check(A, "k")
    tries.wrong(A, "k")
    with pytest.raises(RateLimited):
        tries.check(A, "k")


def test_a_key_that_turns_out_wrong_is_slowed_again(tries: WrongKeys) -> None:
    """A revoked key was right lately."""
    tries.right("k")
    for _ in range(6):
        tries.wrong(A, "other")
    tries.check(A, "k")
    tries.wrong(A, "k")
    with pytest.raises(RateLimited):
        tries.check(A, "k")


def test_memory_is_bounded(tries: WrongKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MAX_ENTRIES", 100)
    for number in range(1_000):
        tries.wrong(f"198.51.{number // 250}.{number % 250}", "k")
        tries.right(f"k{number}")
    assert len(tries._tries) == len(tries._right) == 100
    tries.check(A, "k999")


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    assert counted_address("2001:db8::1") == counted_address("2001:db8::ffff:1") == "2001:db8::/64"
    assert counted_address("2001:db8:0:1::1") != counted_address("2001:db8::1")
    assert counted_address("::ffff:203.0.113.1") == counted_address(A) == A
    assert counted_address("unix") == "unix"
