"""Attention of packed rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from heft_engine.data.encoding import Example
from heft_engine.model.attention import packed_attention
from heft_engine.model.packing import pack


def rows(count: int) -> list[Example]:
    chance = random.Random(1)
    prompts = [tuple(chance.randrange(5, 600) for _ in range(chance.randint(1, 90))) for _ in range(count)]
    return [Example(prompt=prompt, answers=((7,), (8,)), labels=("a", "b"), gold=0) for prompt in prompts]


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_of_packed_rows_is_each_rows_own(window: int | None, softcap: float | None) -> None:
    """The result equals the formula, computed for every row alone in float64."""
    torch.manual_seed(2)
    layout = pack(rows(7)).layout
    tokens = sum(row.length for row in layout.rows)
    q, k, v = (torch.randn(1, heads, tokens, 8).bfloat16() for heads in (4, 2, 2))
    module = nn.Module()
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    together, _ = packed_attention(module, q, k, v, None, layout=layout, **options)  # type: ignore[arg-type]
    for row in layout.rows:
        span = slice(row.start, row.start + row.length)
        a, b, c = (tensor[0, :, span].double() for tensor in (q, k, v))
        scores = a @ b.repeat_interleave(2, 0).transpose(1, 2) * 0.3
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(row.length)[:, None] - torch.arange(row.length)
        hidden = (distance < 0) | (distance >= (window or 10_000))
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        expected = (weights @ c.repeat_interleave(2, 0)).transpose(0, 1)
        torch.testing.assert_close(together[0, span].double(), expected, atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_a_row_that_is_no_number_leaves_its_neighbours_alone() -> None:
    """The neighbours may be another customer's rows."""
    torch.manual_seed(2)
    layout = pack(rows(5)).layout
    tokens = sum(row.length for row in layout.rows)
    q, k, v = (torch.randn(1, heads, tokens, 8).bfloat16() for heads in (4, 2, 2))
    before, _ = packed_attention(nn.Module(), q, k, v, None, layout=layout)
    broken = layout.rows[2]
    span = slice(broken.start, broken.start + broken.length)
    for tensor in (q, k, v):
        tensor[:, :, span] = float("nan")
    result, _ = packed_attention(nn.Module(), q, k, v, None, layout=layout)
    assert result[:, span].isnan().all()
    result[:, span] = before[:, span]
    assert torch.equal(result, before)
