"""Tiny random models, made once a session; one thread, because tiny products only lose by more."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import make_tiny_model, tiny_llama_dir

__all__ = ["make_tiny_model", "tiny_llama_dir"]


@pytest.fixture
def batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are made in this test give a row the same bits in any batch."""
    monkeypatch.setenv("HEFT_BATCH_INVARIANT", "1")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
