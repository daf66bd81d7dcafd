"""Idempotency keys: one key, one body, one thing. (Simultaneous ones: test_races.)"""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from store import idempotency
from store.errors import Conflict


def reserve(bench, resource_id: str, *, key: str = "k", body: str = "h", owner_id: str = "team"):
    return bench.do(idempotency.reserve, owner_id=owner_id, key=key, body_hash=body, resource_id=resource_id)


def test_the_same_request_gets_the_same_thing(bench) -> None:
    assert reserve(bench, "first") == idempotency.Reservation(resource_id="first", is_new=True)
    assert reserve(bench, "second") == idempotency.Reservation(resource_id="first", is_new=False)


def test_another_body_under_the_same_key_is_refused(bench) -> None:
    reserve(bench, "first")
    with pytest.raises(Conflict) as refused:
        reserve(bench, "second", body="other")
    assert refused.value.code == "idempotency_key_reused"


def test_keys_of_different_owners_have_nothing_to_do_with_each_other(bench) -> None:
    reserve(bench, "first")
    assert reserve(bench, "second", owner_id="others", body="other").is_new


def test_a_request_that_failed_leaves_its_key_free(bench) -> None:
    def reserve_and_fail(session: Session) -> None:
        idempotency.reserve(session, owner_id="team", key="k", body_hash="h", resource_id="first")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.do(reserve_and_fail)
    assert reserve(bench, "second", body="other").is_new


def test_a_key_of_last_week_is_as_good_as_new(bench) -> None:
    reserve(bench, "first", key="old")
    reserve(bench, "first", key="recent")
    bench.sql("UPDATE idempotency_keys SET created_at = now() - interval '8 days' WHERE key = 'old'")
    bench.sql("UPDATE idempotency_keys SET created_at = now() - interval '6 days' WHERE key = 'recent'")
    bench.do(idempotency.delete_old)
    assert reserve(bench, "second", key="old", body="other").is_new
    assert not reserve(bench, "second", key="recent").is_new
