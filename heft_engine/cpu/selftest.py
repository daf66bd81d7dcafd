"""Self-tests of the compiled operators, run when a process first loads them, in hundredths of a second.

Fused operators, linear layers on AMX and what is done around them must have the bits of torch's operations, SiLU for
every bfloat16 number. Attention and LoRA deltas must be close to their formulas, and the same to the bit in other
company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.cpu.amx import AmxOps, LoraDelta, Norm, Projection, Segments
from heft_engine.cpu.fused_ops import FusedOps, rms_norm
from heft_engine.runtime.threads import torch_threads

#: x (rows, in), weight (out, in), bias (out,) → (rows, out).
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Random:
    """Draws the same bfloat16 numbers in every process, normally distributed."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).bfloat16()


@torch.inference_mode()
def failed_fused_check(ops: FusedOps) -> str | None:
    """Returns the name of the first operator that fails its check; None if all pass."""
    draw = _Random()
    for width in (50, 64, 576, 2_048, 4_100, 18_432):
        x, weight = draw(40, width), draw(width)
        if not torch.equal(ops.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5)):
            return "the norm"
    for rows, width in ((1, 576), (6, 72)):
        x, weight = draw(rows, width), draw(50, width)
        exact = (x.double() @ weight.double().T).float()
        if not torch.allclose(ops.logits(x, weight), exact, rtol=1e-4, atol=1e-4):
            return "the logits"
    for width in (8, 64, 72, 128):
        x, cosine, sine = draw(90, 5, width), draw(90, width), draw(90, width)
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        if not torch.equal(ops.rotate(x, cosine, sine), x * cosine[:, None] + turned * sine[:, None]):
            return "the rotary embedding"
    return None


def torch_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns torch's product in blocks of 32 rows, which it sums in the order of the AMX operators."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 32))
    return torch.cat([F.linear(block, weight, bias) for block in torch.split(rows, 32)])[: len(x)]


@torch.inference_mode()
def failed_amx_check(ops: AmxOps, product: Product = torch_product) -> str | None:
    """Returns the name of the first operator that fails its check; None if all pass. `product`: the expected bits."""
    draw = _Random()
    return (
        _failed_linear(ops, draw, product)
        or _failed_gated_mlp(ops, draw, product)
        or (None if _lora_is_right(ops, draw, product) else "a LoRA delta")
        or (None if _silu_is_exact(ops) else "SiLU")
        or (None if _attention_is_right(ops, draw) else "attention")
    )


def _failed_linear(ops: AmxOps, draw: _Random, product: Product) -> str | None:
    # More rows than one chunk has, and inputs in two passes.
    x, residual, bias = draw(289, 640), draw(289, 160), draw(160)
    weight, other, norm = draw(160, 640), draw(160, 640), Norm(draw(640), 1e-5)
    plain, with_bias = product(x, weight, None), product(x, weight, bias)
    normed = rms_norm(x, *norm)
    expected = [product(normed, other, None), product(normed, weight, bias)]
    for packed in (None, ops.pack(weight)):
        if not torch.equal(ops.linear(x, weight, packed), plain):
            return "a product"
        if not torch.equal(ops.linear(x, weight, packed, bias), with_bias):
            return "a product with a bias"
        if not torch.equal(ops.linear(x, weight, packed, None, residual), plain + residual):
            return "a product and a sum"
        projections = [Projection(other), Projection(weight, packed, bias)]
        if not all(map(torch.equal, ops.norm_linears(x, norm, projections), expected)):
            return "a product of normed states"
    return None


def _failed_gated_mlp(ops: AmxOps, draw: _Random, product: Product) -> str | None:
    x, norm = draw(289, 640), Norm(draw(640), 1e-5)
    gate, up, down = weights = (draw(160, 640), draw(160, 640), draw(640, 160))
    normed = rms_norm(x, *norm)
    # One thread: torch rounds the remainders of several threads' shares differently.
    with torch_threads(1):
        active = F.silu(product(normed, gate, None)) * product(normed, up, None)
    expected = product(active, down, None) + x
    packed = (ops.pack(gate), ops.pack(up), ops.pack(down))
    is_right = all(
        torch.equal(ops.gated_mlp(x, norm, weights, copies), expected) for copies in (None, packed)
    )
    return None if is_right else "a gated MLP"


def _silu_is_exact(ops: AmxOps) -> bool:
    """For all bfloat16 numbers but those that AMX flushes to zero, smaller than 2⁻¹²⁶."""
    numbers = _finite_bfloat16()
    numbers = numbers[(numbers.abs() >= 2.0**-125) | (numbers == 0)]
    others = torch.tensor([torch.nan, torch.inf, -torch.inf]).bfloat16()
    with torch_threads(1):
        expected = F.silu(torch.cat([numbers, others]))
    # One at a time what is no finite number: zero times it would spread in a product.
    activated = _activated(ops, [*torch.split(numbers, 255), *torch.split(others, 1)])
    return torch.allclose(activated, expected, rtol=0, atol=0, equal_nan=True)


def _activated(ops: AmxOps, groups: Iterable[Tensor]) -> Tensor:
    """SiLU of each number of groups of up to 255, as a gated MLP computes it."""
    # The norm of the one row is a 1 and zeros, so that the gate's product is its first column.
    width = 256
    row, norm = torch.zeros(1, width).bfloat16(), Norm(torch.full((width,), width**-0.5).bfloat16(), 0.0)
    row[0, 0] = 1
    results = []
    for group in groups:
        gate, up, down = torch.zeros(3, width, width).bfloat16()
        gate[: len(group), 0], up[:, 0] = group, 1
        # To columns in which the residual is zero.
        down[1:, :-1].fill_diagonal_(1)
        results.append(ops.gated_mlp(row, norm, (gate, up, down), None)[0, 1 : len(group) + 1])
    return torch.cat(results)


def _lora_is_right(ops: AmxOps, draw: _Random, product: Product) -> bool:
    """Rows with a delta are close to the formula and independent of their place; the others have none."""
    rows, ins, outs = 90, 640, 48
    x, weight = draw(rows, ins), draw(outs, ins)
    deltas = [
        LoraDelta(start, tokens, draw(2, rank, ins), draw(2, rank, outs), 1)
        for start, tokens, rank in ((3, 30, 8), (40, 45, 40))
    ]
    together = ops.linear(x, weight, lora_deltas=deltas)
    is_plain = torch.ones(rows, dtype=torch.bool)
    for delta in deltas:
        span = slice(delta.start, delta.start + delta.tokens)
        is_plain[span] = False
        alone = ops.linear(x[span], weight, lora_deltas=[delta._replace(start=0)])
        down, up = delta.down[1].float(), delta.up[1].float()
        low = (x[span].float() @ down.T).bfloat16().float()
        exact = x[span].float() @ weight.float().T + low @ up
        is_close = (together[span] - exact).abs().max() <= exact.abs().max() * 2.0**-7
        if not is_close or not torch.equal(alone, together[span]):
            return False
    return torch.equal(together[is_plain], product(x, weight, None)[is_plain])


def _attention_is_right(ops: AmxOps, draw: _Random) -> bool:
    """Results are close to the formula, and the same behind a cached prefix."""
    tokens, prefix, heads, kv_heads, width = 75, 41, 4, 2, 64
    query, keys, values = (
        draw(tokens, heads, width),
        draw(tokens, kv_heads, width),
        draw(tokens, kv_heads, width),
    )
    whole_row = Segments([(0, tokens, [(0, 0, tokens)])])
    behind_prefix = Segments([(0, tokens - prefix, [(1, 0, prefix), (0, 0, tokens - prefix)])])
    sources = [(keys[prefix:], values[prefix:]), (keys[:prefix], values[:prefix])]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    for window in (None, 20):
        whole = ops.attention(query, [(keys, values)], whole_row, None, window)
        rest = ops.attention(query[prefix:], sources, behind_prefix, None, window)
        mask = (distance >= 0) & (distance < (window or tokens))
        q, k, v = (x.float().transpose(0, 1) for x in (query, keys, values))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        # Shares and results are rounded to bfloat16: 2⁻⁹ of the largest value, twice.
        is_close = (whole - exact).abs().max() <= values.abs().max() * 2.0**-8
        if not is_close or not torch.equal(rest, whole[prefix:]):
            return False
    return True


def _finite_bfloat16() -> Tensor:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return numbers[numbers.isfinite()]
