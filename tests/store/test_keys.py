"""API keys: shown once, kept as a hash, found by id; an operator's own key of any shape works too."""

from __future__ import annotations

import re

import pytest

from store import keys
from store.errors import Conflict, InvalidRequest, NotFound, Unauthenticated


def test_a_key_tells_its_owner_and_is_stored_nowhere(bench) -> None:
    key = bench.do(keys.create, owner_id="team", name="laptop")
    assert re.fullmatch(r"heft_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", key)
    owner = bench.do(keys.authenticate, key)
    assert owner.id == "team"
    [row] = bench.do(keys.list_keys)
    assert (row.id, row.name) == (owner.key_id, "laptop") == (key.split("_")[1], "laptop")
    secret = key.split("_", 2)[2]
    assert secret.encode() not in row.secret_hash
    assert secret not in str(bench.sql("SELECT * FROM api_keys"))


@pytest.mark.parametrize("change", ["secret", "id", "shape", "empty", "surrogate"])
def test_a_key_that_nobody_issued_is_refused(bench, change: str) -> None:
    key = bench.do(keys.create, owner_id="team", name="laptop")
    wrong = {
        "secret": key[:-1] + ("A" if key[-1] != "A" else "B"),
        "id": "heft_" + "0" * 16 + key[21:],
        "shape": key + "x",
        "empty": "",
        "surrogate": "\ud800",
    }[change]
    with pytest.raises(Unauthenticated):
        bench.do(keys.authenticate, wrong)


def test_a_revoked_key_is_refused_and_stays_revoked(bench) -> None:
    key = bench.do(keys.create, owner_id="team", name="laptop")
    owner = bench.do(keys.authenticate, key)
    with pytest.raises(NotFound):
        bench.do(keys.revoke, key_id=owner.key_id, owner_id="others")
    bench.do(keys.revoke, key_id=owner.key_id)
    bench.do(keys.ensure, key, "team", "laptop")
    with pytest.raises(Unauthenticated):
        bench.do(keys.authenticate, key)
    with pytest.raises(NotFound):
        bench.do(keys.revoke, key_id=owner.key_id)


@pytest.mark.parametrize(
    "key", ["s3cret-s3cret-16", "sk-proj-abc_def/+=.", "a long key of ours", "heft_not_of_our_own_form"]
)
def test_an_operators_own_key_may_have_any_shape(bench, key: str) -> None:
    for _ in range(2):  # at every start of the service
        bench.do(keys.ensure, key, "team", "first key")
    assert bench.do(keys.authenticate, key).id == "team"
    assert len(bench.do(keys.list_keys, owner_id="team")) == 1
    assert bench.do(keys.list_keys, owner_id="others") == []
    with pytest.raises(Unauthenticated):
        bench.do(keys.authenticate, key + "x")


@pytest.mark.parametrize(
    "key", ["", "k", "fifteen-letters", "x" * 513, "\u043a\u043b\u044e\u0447" * 8, " a key with a space"]
)
def test_a_key_that_could_be_guessed_or_not_be_sent_is_refused(bench, key: str) -> None:
    with pytest.raises(InvalidRequest, match="16 to 512 characters") as refused:
        bench.do(keys.ensure, key, "team", "first key")
    assert refused.value.param == "key"
    with pytest.raises(Unauthenticated, match="16 to 512 characters"):
        keys.check_form(key)


def test_a_key_made_elsewhere_in_our_shape_keeps_its_id(bench) -> None:
    key = "heft_" + "a" * 16 + "_" + "B" * 43
    assert bench.do(keys.create, owner_id="team", name="n", key=key) == key
    assert bench.do(keys.authenticate, key).key_id == "a" * 16
    with pytest.raises(Conflict):
        bench.do(keys.ensure, key[:-1] + "C", "team", "n")


@pytest.mark.parametrize("owner_id", ["", "a:b", "a b", "x" * 65, "../up"])
def test_an_owners_name_must_fit_into_a_model_id(bench, owner_id: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bench.do(keys.create, owner_id=owner_id, name="n")
    assert refused.value.param == "owner_id"


def test_the_last_use_is_noted_once_a_minute(bench) -> None:
    key = bench.do(keys.create, owner_id="team", name="laptop")

    def used() -> object:
        return bench.do(keys.list_keys)[0].last_used_at

    assert used() is None
    bench.do(keys.authenticate, key)
    first = used()
    assert first is not None
    bench.do(keys.authenticate, key)
    assert used() == first
    bench.sql("UPDATE api_keys SET last_used_at = now() - interval '61 seconds'")
    bench.do(keys.authenticate, key)
    assert used() > first
