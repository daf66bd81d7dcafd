"""Tiny random models, made once a session; one thread, because tiny products only lose by more."""

from collections.abc import Iterator

import pytest
import torch
from tiny_models import make_tiny_model, tiny_llama_dir

from heft_engine import fixed_shapes

__all__ = ["make_tiny_model", "tiny_llama_dir"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Nor is every model's first pass measured a second time with all processors.
        patch.setattr(fixed_shapes, "processors", torch.get_num_threads)
        yield
    torch.set_num_threads(before)
