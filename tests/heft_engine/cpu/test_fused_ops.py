"""Fused operators: torch's bits, one order of sums, and errors for tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from needs import needs_compiler
from torch import Tensor

from heft_engine.cpu import operators
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.runtime.threads import torch_threads

pytestmark = needs_compiler


@pytest.fixture
def ops() -> FusedOps:
    fused_ops = operators.fused_ops()
    assert fused_ops is not None
    torch.manual_seed(3)
    return fused_ops


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 3])
def test_operators_have_the_bits_of_torchs_operations(ops: FusedOps, threads: int) -> None:
    torch.set_num_threads(threads)
    # More elements than one thread takes, and an odd number of rows.
    x, y, weight = draw(1, 301, 576), draw(1, 301, 576), draw(576)
    single = x.float()
    normed = (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), weight * normed)
    total = y.clone()
    again = ops.add_rms_norm(x, total, weight, 1e-6)
    assert torch.equal(total, x + y)
    assert torch.equal(again, ops.rms_norm(x + y, weight, 1e-6))
    gate, up = draw(301, 1_536), draw(301, 1_536)
    with torch_threads(1):  # torch rounds the remainders of several threads' shares differently
        expected = F.silu(gate) * up
    assert torch.equal(ops.gate_silu(gate.clone(), up), expected)


@torch.inference_mode()
def test_logits_are_summed_in_one_order(ops: FusedOps) -> None:
    """Whatever the number of rows and threads; torch's differ with both."""
    for width in (8, 96, 590):
        x, weight = draw(11, width), draw(600, width)
        exact = (x.double() @ weight.double().T).float()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            logits = ops.logits(x, weight)
            torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-4)
            for rows in (1, 2, 4, 5):
                assert torch.equal(ops.logits(x[3 : 3 + rows], weight), logits[3 : 3 + rows])
            torch.set_num_threads(1)
            assert torch.equal(ops.logits(x, weight), logits)


def test_tensors_that_do_not_fit_are_refused(ops: FusedOps) -> None:
    """Kernels see addresses alone, and would read and write beyond them."""
    x, weight, places, none = draw(6, 2, 8), draw(8), torch.arange(6), torch.arange(0)
    angles, strided = draw(6, 8), draw(2, 6, 8).transpose(0, 1)
    wrong: list[tuple[str, Callable[[], object]]] = [
        (r"weight must have the shape \(8\), not \(9\)", lambda: ops.rms_norm(x, draw(9), 1e-5)),
        ("x must be .* of BFloat16", lambda: ops.rms_norm(x.float(), weight, 1e-5)),
        ("y must have the shape", lambda: ops.add_rms_norm(draw(5, 2, 8), x, weight, 1e-5)),
        ("y must be contiguous", lambda: ops.add_rms_norm(x, strided, weight, 1e-5)),
        ("x must be contiguous", lambda: ops.rotate(strided, angles, angles, places, none)),
        ("cosine must have the shape", lambda: ops.rotate(x, angles[:5], angles, places, none)),
        ("cosine must be BFloat16", lambda: ops.rotate(x, angles.float(), angles, places, none)),
        ("places must have the shape", lambda: ops.rotate(x, angles, angles, places[:4], none)),
        ("places must be from 0 to 5", lambda: ops.rotate(x, angles, angles, places + 1, none)),
        ("gaps must be Long", lambda: ops.rotate(x, angles, angles, places, none.int())),
        ("places must have the shape", lambda: ops.place(x, places[:4], none)),
        ("x must be contiguous", lambda: ops.place(strided, places, none)),
        ("up must have the shape", lambda: ops.gate_silu(x, draw(6, 2, 7))),
        ("gate must be contiguous", lambda: ops.gate_silu(strided, x)),
        ("weight must have the shape", lambda: ops.logits(draw(6, 8), draw(9, 7))),
        ("weight must be BFloat16", lambda: ops.logits(draw(6, 8), draw(9, 8).float())),
        ("weight must be contiguous", lambda: ops.logits(draw(6, 8), draw(8, 9).T)),
        ("heft::rms_norm", lambda: ops.rms_norm(x.to("meta"), weight, 1e-5)),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_schemas_tell_what_is_changed(ops: FusedOps) -> None:
    x, y, weight, places, none = draw(6, 8), draw(6, 8), draw(8), torch.arange(6), torch.arange(0)
    heads = draw(6, 2, 8)
    heft = torch.ops.heft
    samples: list[tuple[object, tuple[object, ...]]] = [
        (heft.rms_norm, (x, weight, 1e-5)),
        (heft.add_rms_norm, (x, y, weight, 1e-5)),
        (heft.rotary_embedding, (heads, x, y, places, none)),
        (heft.scatter_rows, (heads, places, none)),
        (heft.silu_mul, (x, y)),
        (heft.logits, (x.float(), y)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator.default, arguments, test_utils="test_schema")  # type: ignore[attr-defined]
