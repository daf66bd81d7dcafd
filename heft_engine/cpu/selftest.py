"""Whether heft_engine.cpu.amx gives what it should on this machine: tried out whenever a process loads it, in
hundredths of a second.

Products, what is done around them, and SiLU for every bfloat16 number are held to torch's, to the bit; attention and
LoRA deltas to their formulas, and to themselves in other company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from heft_engine.cpu.amx import AmxOps, LoraDelta, Norm, Projection, Segments
from heft_engine.cpu.fused_ops import FusedOps, rms_norm
from heft_engine.runtime.threads import torch_threads

#: Numbers that SiLU is tried with at a time.
_GROUP = 255


@torch.inference_mode()
def failed_fused_check(kernels: FusedOps) -> str | None:
    """The name of the first function that gives other bits than torch's operations, if there is one."""
    made = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).bfloat16()

    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gates = every[every.isfinite()]
    for gate, up in ((gates, torch.ones_like(gates)), (some(320), some(320))):
        if not torch.equal(kernels.gate_silu(gate.clone(), up), F.silu(gate) * up):
            return "the gated activation"
    for width in (50, 64, 576, 2_048, 4_100, 18_432):
        x, y, weight = some(40, width), some(40, width), some(width)
        if not torch.equal(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5)):
            return "the norm"
        total = y.clone()
        normed = kernels.add_rms_norm(x, total, weight, 1e-5)
        if not (torch.equal(total, x + y) and torch.equal(normed, rms_norm(x + y, weight, 1e-5))):
            return "the sum and its norm"
    for rows, width in ((1, 576), (6, 72)):
        x, weight = some(rows, width), some(50, width)
        exact = (x.double() @ weight.double().T).float()
        if not torch.allclose(kernels.logits(x, weight), exact, rtol=1e-4, atol=1e-4):
            return "the head"
    order = torch.randperm(100, generator=made)
    places, gaps = order[:90].contiguous(), order[90:].contiguous()
    for width in (8, 64, 72, 128):
        x, cosine, sine = some(90, 5, width), some(90, width), some(90, width)
        turned = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        rotated = x * cosine[:, None] + turned * sine[:, None]
        placed = [x.new_zeros(100, 5, width).index_copy_(0, places, each) for each in (x, rotated)]
        if not torch.equal(kernels.place(x, places, gaps), placed[0]):
            return "placing"
        if not torch.equal(kernels.rotate(x, cosine, sine, places, gaps), placed[1]):
            return "the rotary embedding"
    return None


@torch.inference_mode()
def failed_amx_check(amx_ops: AmxOps) -> str | None:
    """The name of the first function that does not give what it should, if there is one."""
    made = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).bfloat16()

    # More rows than one chunk has, and a width that is multiplied in two parts.
    rows, width, inner = 289, 640, 160
    x, residual, bias = some(rows, width), some(rows, inner), some(inner)
    gate, up, down = some(inner, width), some(inner, width), some(width, inner)
    norm = Norm(some(width), 1e-5)
    normed = rms_norm(x, *norm)
    for packed in (None, amx_ops.pack(gate)):
        if not torch.equal(amx_ops.linear(x, gate, packed), _product(x, gate)):
            return "a product"
        if not torch.equal(amx_ops.linear(x, gate, packed, bias), _product(x, gate, bias)):
            return "a product with a bias"
        if not torch.equal(amx_ops.linear(x, gate, packed, None, residual), _product(x, gate).add_(residual)):
            return "a product and a sum"
        found = amx_ops.norm_linears(x, norm, [Projection(up), Projection(gate, packed, bias)])
        if not all(map(torch.equal, found, (_product(normed, up), _product(normed, gate, bias)))):
            return "a product of normed states"
    # One thread: several leave torch rests, which it rounds otherwise.
    with torch_threads(1):
        expected = _product(F.silu(_product(normed, gate)) * _product(normed, up), down) + x
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        # AMX flushes to zero what is smaller than 2⁻¹²⁶.
        numbers = every[every.isfinite() & ((every.abs() >= 2.0**-125) | (every == 0))]
        others = torch.tensor([torch.nan, torch.inf, -torch.inf]).bfloat16()
        activations = F.silu(torch.cat([numbers, others]))
    all_packed = (amx_ops.pack(gate), amx_ops.pack(up), amx_ops.pack(down))
    for chosen in (None, all_packed):
        if not torch.equal(amx_ops.gated_mlp(x, norm, (gate, up, down), chosen), expected):
            return "a gated activation"
    if not _adds(amx_ops, some):
        return "a LoRA delta"
    groups = (*torch.split(numbers, _GROUP), *torch.split(others, 1))
    if not torch.allclose(_activated(amx_ops, groups), activations, rtol=0, atol=0, equal_nan=True):
        return "SiLU"
    return None if _attends(amx_ops, some) else "attention"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By torch, 32 rows at a time: it sums such products in the units' order."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 32))
    return torch.cat([F.linear(part, weight, bias) for part in torch.split(rows, 32)])[: len(x)]


def _activated(amx_ops: AmxOps, groups: Iterable[Tensor]) -> Tensor:
    """SiLU of each number of groups up to _GROUP, as `gated` computes it."""
    # The norm makes a 1 and zeros of the one row, so that the gate's first column is what comes out of its product.
    width = _GROUP + 1
    row, weight = torch.zeros(1, width).bfloat16(), torch.full((width,), width**-0.5).bfloat16()
    row[0, 0] = 1
    found = []
    for group in groups:
        gate, up, down = torch.zeros(3, width, width).bfloat16()
        gate[: len(group), 0], up[:, 0] = group, 1
        # What comes out where the row itself is zero.
        down[1:, :-1].fill_diagonal_(1)
        found.append(amx_ops.gated_mlp(row, Norm(weight, 0.0), (gate, up, down), None)[0, 1 : len(group) + 1])
    return torch.cat(found)


def _adds(amx_ops: AmxOps, some: Callable[..., Tensor]) -> bool:
    """Whether LoRA deltas are those of their rows alone, wherever these stand, and what they should be."""
    rows, ins, outs = 90, 640, 48
    x, weight = some(rows, ins), some(outs, ins)
    factors = [(some(2, rank, ins), some(2, rank, outs)) for rank in (8, 40)]
    places = [(3, 30, 0), (40, 45, 1)]
    lora_deltas = [LoraDelta(start, count, *factors[i], 1) for start, count, i in places]
    together = amx_ops.linear(x, weight, lora_deltas=lora_deltas)
    untouched = torch.ones(rows, dtype=torch.bool)
    for lora_delta in lora_deltas:
        own = slice(lora_delta.start, lora_delta.start + lora_delta.tokens)
        untouched[own] = False
        alone = lora_delta._replace(start=0)
        if not torch.equal(amx_ops.linear(x[own], weight, lora_deltas=[alone]), together[own]):
            return False
        down, up = lora_delta.down[1], lora_delta.up[1]
        low = (x[own].float() @ down.float().T).bfloat16().float()
        exact = x[own].float() @ weight.float().T + low @ up.float()
        if not (together[own] - exact).abs().max() <= exact.abs().max() * 2.0**-7:
            return False
    return torch.equal(together[untouched], _product(x, weight)[untouched])


def _attends(amx_ops: AmxOps, some: Callable[..., Tensor]) -> bool:
    """Whether attention is what its formula says, and a query's the same behind a kept prefix."""
    tokens, left, heads, kv_heads, width = 75, 41, 4, 2, 64
    query, keys, values = (
        some(tokens, heads, width),
        some(tokens, kv_heads, width),
        some(tokens, kv_heads, width),
    )
    positions = torch.arange(tokens)
    for window in (None, 20):
        whole = amx_ops.attention(
            query, [(keys, values)], Segments([(0, tokens, [(0, 0, tokens)])]), None, window
        )
        behind = amx_ops.attention(
            query[left:].contiguous(),
            [(keys[left:], values[left:]), (keys[:left], values[:left])],
            Segments([(0, tokens - left, [(1, 0, left), (0, 0, tokens - left)])]),
            None,
            window,
        )
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance < (window or tokens))
        q, k, v = (each.float().transpose(0, 1) for each in (query, keys, values))
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        # Shares and results are rounded to bfloat16: 2⁻⁹ of the largest value that is summed, twice.
        is_close = (whole - exact).abs().max() <= values.abs().max() * 2.0**-8
        if not is_close or not torch.equal(behind, whole[left:]):
            return False
    return True
