"""A device that has memory for passes of a few tokens only."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from heft_engine.model.packed_lm import PackedLM


def limit_pass_tokens(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """Lets passes of more tokens run out of memory, in the last layer. Returns the tokens of each pass to come."""
    run_layers, passes = PackedLM.run_layers, []

    def limited(lm: PackedLM, states: Tensor, *arguments: Any) -> Tensor:
        passes.append(states.shape[1])
        out = run_layers(lm, states, *arguments)
        if states.shape[1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB")
        return out

    monkeypatch.setattr(PackedLM, "run_layers", limited)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of a whole test session it takes a third of a second
    return passes
