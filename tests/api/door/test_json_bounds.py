"""Depth and number of values of a JSON text, told from its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from api.door.json_bounds import _STRING, MAX_DEPTH, check_json
from store.errors import TooLarge

VALUES = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{},:"\\ \n\u20ac"')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=30,
)


def size_of(value: Any) -> int:
    """Values within a value, and itself."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(size_of(part) for part in parts)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_texts_do_not_count_and_values_do(value: Any, escaped: bool) -> None:
    body = json.dumps(value, ensure_ascii=escaped).encode()
    # A bracket and a comma are counted, so that an empty list counts for its value that isn't there.
    check_json(body, max_values=2 * size_of(value))


@pytest.mark.parametrize("text", ["[[[", "{" * 90, ",,,", '\\"[', '\\\\"', "\\", "]]]"])
def test_brackets_within_a_string_are_text(text: str) -> None:
    check_json(json.dumps({"a": text * 100}).encode(), max_values=50)


def test_deep_nesting_is_refused_at_the_first_level_too_many() -> None:
    check_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, max_values=100)
    for bracket in (b"[", b'{"a":'):
        with pytest.raises(HTTPException) as refusal:
            check_json(bracket * (MAX_DEPTH + 1), max_values=100)
        assert refusal.value.status_code == 400


def test_many_values_are_refused() -> None:
    check_json(b"[" + b"0," * 98 + b"0]", max_values=100)
    for body in (
        b"[" + b"0," * 100 + b"0]",
        b"[" + b"[]," * 50 + b"[]]",
        b'{"a":1,' + b'"b":1,' * 99 + b'"c":1}',
    ):
        with pytest.raises(TooLarge, match="more than 100 values"):
            check_json(body, max_values=100)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_another_encoding_which_the_parser_would_take_is_refused(encoding: str) -> None:
    with pytest.raises(HTTPException, match="UTF-8"):
        check_json('{"a": 1}'.encode(encoding), max_values=100)


@pytest.mark.parametrize("body", [b'"', b'"\\"', b'"\\', b'"a\\\\"', b'"\\\n"', b'"a'])
def test_a_string_is_one_match_even_if_it_does_not_end(body: bytes) -> None:
    """An attempt that fails would be made again at each quote: quadratic."""
    assert _STRING.fullmatch(body)
    assert _STRING.sub(b"", b'"' + b'\\"' * 1_000) == b""
