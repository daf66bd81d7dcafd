"""Self-tests pass with correct operators and name one that gets a single number wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from needs import needs_compiler
from torch import Tensor

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.cpu.selftest import failed_amx_check, failed_fused_check


class Faulty:
    """Operators of which one changes the last number of its result, for calls that `hits` chooses."""

    def __init__(self, ops: Any, name: str, hits: Callable[..., bool] = lambda *_, **__: True) -> None:
        self._ops, self._name, self._hits = ops, name, hits

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._ops, name)

        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            if name == self._name and self._hits(*args, **options):
                last = result[-1] if isinstance(result, list) else result
                last.view(-1)[-1:].neg_().sub_(1)
            return result

        return call


@needs_compiler
@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("rms_norm", "the norm"),
        ("rotate", "the rotary embedding"),
        ("logits", "the logits"),
    ],
)
def test_a_wrong_fused_operator_is_named(name: str, failed: str) -> None:
    right: Any = operators.fused_ops()
    assert isinstance(right, FusedOps)
    assert failed_fused_check(Faulty(right, name)) == failed  # type: ignore[arg-type]


def test_right_operators_pass(amx_ops: AmxOps) -> None:
    assert failed_amx_check(amx_ops, product_of(amx_ops)) is None


def product_of(ops: AmxOps) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The expected products: test_amx.py holds them to the formula."""
    return lambda x, weight, bias: ops.linear(x, weight, None, bias)


def has_bias(x: Tensor, weight: Tensor, packed: Any, bias: Any = None, *_: Any) -> bool:
    return bias is not None


def has_residual(x: Tensor, weight: Tensor, packed: Any, bias: Any = None, residual: Any = None) -> bool:
    return residual is not None


def is_packed(x: Tensor, norm: Any, weights: Any, packed: Any) -> bool:
    return packed is not None


@pytest.mark.parametrize(
    ("name", "hits", "failed"),
    [
        ("linear", lambda *_, **options: not options, "a product"),
        ("linear", lambda *args, **options: not options and has_bias(*args), "a product with a bias"),
        ("linear", lambda *args, **options: not options and has_residual(*args), "a product and a sum"),
        ("linear", lambda x, *_, lora_deltas=(): len(x) == 90 and lora_deltas, "a LoRA delta"),
        ("norm_linears", lambda *_: True, "a product of normed states"),
        ("gated_mlp", is_packed, "a gated MLP"),
        ("gated_mlp", lambda x, *_: len(x) == 1, "SiLU"),
        ("attention", lambda query, *_: len(query) == 75, "attention"),
        ("attention", lambda query, *_: len(query) == 34, "attention"),
    ],
)
def test_a_wrong_amx_operator_is_named(
    amx_ops: AmxOps, name: str, hits: Callable[..., bool], failed: str
) -> None:
    assert failed_amx_check(Faulty(amx_ops, name, hits), product_of(amx_ops)) == failed  # type: ignore[arg-type]
