"""A CPU's matrix units, with and without: machines have them or not."""

from __future__ import annotations

import pytest

from heft_engine import matrix_units

#: As the engine finds them, whatever a test has put in its place.
UNITS = matrix_units.load

needs_matrix_units = pytest.mark.skipif(
    UNITS() is None, reason="this processor has no matrix units, or there is no C++ compiler"
)


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention are torch's, as where a processor has no matrix units or nothing can be compiled."""
    monkeypatch.setattr(matrix_units, "load", lambda: None)


@pytest.fixture(params=["units", "torch"])
def with_and_without_units(request: pytest.FixtureRequest) -> None:
    """Both ways, as far as this machine has both."""
    if request.param == "torch":
        request.getfixturevalue("without_units")
    elif UNITS() is None:
        pytest.skip("this processor has no matrix units, or there is no C++ compiler")
