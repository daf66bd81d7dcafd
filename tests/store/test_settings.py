"""Settings of the service that depend on each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from store.settings import StoreSettings

MIB = 1024**2
ADDRESSES = {
    "database_url": "postgresql+psycopg://u@h/d",
    "redis_url": "redis://h:1/0",
    "artifacts_url": "file:///a",
}


def test_the_bodies_memory_must_hold_the_largest_body_of_one_owner() -> None:
    """One owner may take half: a larger body would be refused for ever as if the service were overloaded."""
    assert StoreSettings(**ADDRESSES, max_question_bytes=128 * MIB).max_body_memory_bytes == 256 * MIB
    with pytest.raises(ValidationError, match="HEFT_MAX_BODY_MEMORY_BYTES must be at least twice"):
        StoreSettings(**ADDRESSES, max_question_bytes=200 * MIB)
