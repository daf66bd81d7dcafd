"""The sealed store: values that a stranger writes are refused, to the process groups that find addresses in it too."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from heft_engine.errors import ForgedMessage
from heft_engine.runtime.messages import Authenticator
from heft_engine.runtime.sealed_store import SealedStore

AUTHENTICATOR = Authenticator(secret="s" * 64)


def test_values_are_those_of_their_names() -> None:
    plain = HashStore()
    store = SealedStore(plain, AUTHENTICATOR)
    assert not store.check(["address"])
    store.set("address", b"\xff\x00 of rank 0")
    store.set("text", "of rank 1")
    store.wait(["address", "text"], timedelta(seconds=1))
    store.wait(["address"])
    assert store.check(["address"])
    assert (store.get("address"), store.get("text")) == (b"\xff\x00 of rank 0", b"of rank 1")
    assert [store.add("number", 2), store.add("number", 3)] == [2, 5]
    plain.set("text", plain.get("address"))  # type: ignore[arg-type]
    with pytest.raises(ForgedMessage):
        store.get("text")


@pytest.mark.parametrize(
    "value", ["", "an address", "ab" * 40, Authenticator(secret="g" * 64).seal("store name", b"value").hex()]
)
def test_a_value_that_a_stranger_has_written_is_forged(value: str) -> None:
    plain = HashStore()
    plain.set("name", value)
    with pytest.raises(ForgedMessage, match="not authentic"):
        SealedStore(plain, AUTHENTICATOR).get("name")


def test_a_group_refuses_an_address_that_a_stranger_has_written() -> None:
    plain, timeout = HashStore(), timedelta(seconds=20)
    store = SealedStore(plain, AUTHENTICATOR)
    ProcessGroupGloo(PrefixStore("alone", store), 0, 1, timeout)
    plain.set("pair/0/1", plain.get("alone/0/0"))  # type: ignore[arg-type]
    with pytest.raises(ForgedMessage):
        ProcessGroupGloo(PrefixStore("pair", store), 0, 2, timeout)
