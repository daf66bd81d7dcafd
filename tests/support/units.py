"""A CPU's matrix units, with and without: machines have them or not.

heft_engine is imported inside the functions, so that tests of the API can be collected without torch.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention are torch's, as where a processor has no matrix units or nothing can be compiled."""
    from heft_engine.cpu import amx as matrix_units

    monkeypatch.setattr(matrix_units, "load", lambda: None)


@pytest.fixture(params=["units", "torch"])
def with_and_without_units(request: pytest.FixtureRequest) -> None:
    """Both ways, as far as this machine has both."""
    from heft_engine.cpu import amx as matrix_units

    if request.param == "torch":
        request.getfixturevalue("without_units")
    elif matrix_units.load() is None:
        pytest.skip("this processor has no matrix units, or there is no C++ compiler")
