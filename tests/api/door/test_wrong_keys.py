"""Tries of wrong keys: a bucket for each address that refills, in bounded memory."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from api.door import wrong_keys
from api.door.addresses import counted_address
from api.door.wrong_keys import WrongKeys
from store.errors import RateLimited, Unauthenticated

A, B = "203.0.113.1", "203.0.113.2"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tries(clock: Clock) -> WrongKeys:
    return WrongKeys(per_minute=6, clock=clock)


def wrong(tries: WrongKeys, host: str, key: str) -> None:
    with pytest.raises(Unauthenticated), tries.trying(host, key):
        raise Unauthenticated("unknown")


def right(tries: WrongKeys, host: str, key: str) -> None:
    with tries.trying(host, key):
        pass


def assert_refused(tries: WrongKeys, host: str, key: str) -> int:
    with pytest.raises(RateLimited) as refusal, tries.trying(host, key):
        pytest.fail("the key is looked up")
    assert refusal.value.retry_after is not None
    return int(refusal.value.retry_after)


def test_tries_refill_with_time(tries: WrongKeys, clock: Clock) -> None:
    for number in range(6):
        wrong(tries, A, f"k{number}")
    assert assert_refused(tries, A, "k") == 10
    wrong(tries, B, "k")
    clock.now += 10
    wrong(tries, A, "k")
    assert_refused(tries, A, "k")


def test_wrong_keys_at_once_take_a_try_each(tries: WrongKeys) -> None:
    """A try is taken before the look-up, however many look-ups are under way."""
    with ExitStack() as under_way:
        for number in range(6):
            under_way.enter_context(tries.trying(A, f"k{number}"))
        assert_refused(tries, A, "k6")
    wrong(tries, A, "k7")  # those were right, and gave their tries back


def test_a_look_up_that_fails_takes_no_try(tries: WrongKeys) -> None:
    for _ in range(20):
        with pytest.raises(ConnectionError), tries.trying(A, "k"):
            raise ConnectionError


def test_a_key_that_was_right_goes_on_beside_a_guesser(tries: WrongKeys) -> None:
    right(tries, A, "k")
    for number in range(6):
        wrong(tries, A, f"k{number}")
    right(tries, A, "k")
    wrong(tries, A, "k")  # revoked
    assert_refused(tries, A, "k")


def test_memory_is_bounded(tries: WrongKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_keys, "MAX_ENTRIES", 100)
    for number in range(1_000):
        host = f"198.51.{number // 250}.{number % 250}"
        wrong(tries, host, "k")
        right(tries, host, f"k{number}")
    assert len(tries._tries) == len(tries._right) == 100


def test_addresses_of_one_ipv6_network_are_one_client() -> None:
    assert counted_address("2001:db8::1") == counted_address("2001:db8::ffff:1") == "2001:db8::/64"
    assert counted_address("2001:db8:0:1::1") != counted_address("2001:db8::1")
    assert counted_address("::ffff:203.0.113.1") == counted_address(A) == A
    assert counted_address("unix") == "unix"
