"""Validation of bodies: each value is visited once, and a list of objects ends at its first fault."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from api.schemas import common
from api.schemas.common import MAX_FIELDS, find_unstorable
from api.schemas.completions import ChatCompletionRequest, CompletionRequest
from api.schemas.predict import PredictRequest
from store.errors import TooLarge


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ("\0", ""),
        ({"a": "\0"}, "a"),
        ({"a": [1, {"b": ["x", "\ud800"]}], "c": "\0"}, "a[1].b[1]"),
        ([[], [{}], [2**63]], "[2][0]"),
        ({"a": {"b": {}}, "c": [{"d": float("nan")}]}, "c[0].d"),
        ({"a": {"b\0": "\0"}}, "a"),
        ({"a": {"b": {"\ud800": 1}}}, "a.b"),
        ({"a": [dict.fromkeys(map(str, range(MAX_FIELDS + 1)))]}, "a[0]"),
    ],
)
def test_a_fault_is_named_by_its_path(body: Any, path: str) -> None:
    fault = find_unstorable(body)
    assert fault is not None
    assert fault[0] == path


def test_what_can_be_stored_has_no_fault() -> None:
    fields = dict.fromkeys(map(str, range(MAX_FIELDS)), 1.5)
    assert find_unstorable({"a": [[], {}, [[None, True, -(2**63)]], fields], "\u20ac": "\n"}) is None


class CountedList(list[Any]):
    """A list that counts how often its items are asked for, and refuses to be copied into a path."""

    visits = 0

    def __iter__(self) -> Any:
        for value in super().__iter__():
            CountedList.visits += 1
            yield value


def test_each_value_is_visited_once_and_no_path_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of 100,000 values at depth 900 once cost 900 times as many path steps."""
    paths: list[object] = []
    monkeypatch.setattr(common, "dotted", paths.append)
    body: Any = CountedList([0] * 100_000)
    for _ in range(900):
        body = CountedList([body])
    assert find_unstorable(body) is None
    assert CountedList.visits == 100_900
    assert paths == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionRequest, {"messages": [0] * 2_000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}] * 2_049}),
        (PredictRequest, {"inputs": [0] * 1_000}),
        (PredictRequest, {"messages": [0] * 2_000}),
        (CompletionRequest, {"prompt": ["a"] * 129}),
    ],
)
def test_a_list_ends_at_its_first_fault(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate({"model": "m", **body})
    assert refusal.value.error_count() <= 2  # a prompt may be a text or a list of texts


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            ChatCompletionRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 9}]},
        ),
        (PredictRequest, {"inputs": [{"messages": [{"role": "user", "content": "a"}] * 9}] * 9}),
    ],
)
def test_only_the_whole_body_is_searched_for_what_can_not_be_stored(
    kind: type[BaseModel], body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[object] = []
    monkeypatch.setattr(common, "find_unstorable", searched.append)
    kind.model_validate({"model": "m", **body})
    assert len(searched) == 1


def test_too_many_inputs_are_refused_before_any_is_validated() -> None:
    with pytest.raises(TooLarge):
        PredictRequest.model_validate({"model": "m", "inputs": [0] * 1_025})
