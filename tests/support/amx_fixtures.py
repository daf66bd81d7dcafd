"""A CPU's AMX, with and without: machines have them or not.

heft_engine is imported inside the functions, so that tests of the API can be collected without torch.
"""

from __future__ import annotations

import pytest


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention are torch's, as where a processor has no AMX or nothing can be compiled."""
    from heft_engine.cpu import operators

    monkeypatch.setattr(operators, "amx_ops", lambda: None)


@pytest.fixture(params=["amx", "torch"])
def with_and_without_amx(request: pytest.FixtureRequest) -> None:
    """Both ways, as far as this machine has both."""
    from heft_engine.cpu import operators

    if request.param == "torch":
        request.getfixturevalue("without_amx")
    elif operators.amx_ops() is None:
        pytest.skip("this processor has no AMX, or there is no C++ compiler")
