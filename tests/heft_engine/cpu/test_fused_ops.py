"""Fused operators have torch's bits and one order of sums, and refuse tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from needs import needs_compiler
from torch import Tensor

from heft_engine.cpu import operators
from heft_engine.cpu.fused_ops import FusedOps

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
    x, weight = draw(1, 301, 576), draw(576)
    single = x.float()
    normed = (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), weight * normed)
    heads, angle = draw(301, 9, 64), torch.rand(301, 64)
    cosine, sine = angle.cos().bfloat16(), angle.sin().bfloat16()
    turned = torch.cat((-heads[..., 32:], heads[..., :32]), dim=-1)
    rotated = heads * cosine[:, None] + turned * sine[:, None]
    assert torch.equal(ops.rotate(heads, cosine, sine), rotated)
    assert torch.equal(ops.rotate(heads, cosine[None], sine[None]), rotated)


@torch.inference_mode()
def test_logits_are_summed_in_one_order(ops: FusedOps) -> None:
    """The bits are the same for any number of rows and threads; torch's differ with both."""
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
    """Kernels see only addresses, and would read and write past the tensors' ends."""
    x, weight, angles, strided = draw(6, 2, 8), draw(8), draw(6, 8), draw(2, 6, 8).transpose(0, 1)
    wrong: list[tuple[str, Callable[[], object]]] = [
        (r"weight must have the shape \(8\), not \(9\)", lambda: ops.rms_norm(x, draw(9), 1e-5)),
        ("x must be .* of BFloat16", lambda: ops.rms_norm(x.float(), weight, 1e-5)),
        ("x must be contiguous", lambda: ops.rotate(strided, angles, angles)),
        ("cosine must have the shape", lambda: ops.rotate(x, angles[:5], angles)),
        ("cosine must be BFloat16", lambda: ops.rotate(x, angles.float(), angles)),
        ("sine must have the shape", lambda: ops.rotate(x, angles, angles[:, :4])),
        ("weight must have the shape", lambda: ops.logits(draw(6, 8), draw(9, 7))),
        ("weight must be BFloat16", lambda: ops.logits(draw(6, 8), draw(9, 8).float())),
        ("weight must be contiguous", lambda: ops.logits(draw(6, 8), draw(8, 9).T)),
        ("heft::rms_norm", lambda: ops.rms_norm(x.to("meta"), weight, 1e-5)),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
