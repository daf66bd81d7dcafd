"""Search spaces consist of lists and ranges only."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from heft_engine.config.search_space import Values


@pytest.mark.parametrize(
    "values",
    [
        {"low": 2, "high": 2},
        {"low": 1e-3, "high": 1e-5, "log": True},
        {"low": 0, "high": 8, "log": True},
        {"low": 1},
        {"low": "1", "high": 3},
        {"low": 1, "high": math.inf},
        {"low": 1, "high": 3, "step": 1},
        [],
        "many",
    ],
)
def test_what_is_no_range_and_no_list_is_refused(values: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Values).validate_python(values)
