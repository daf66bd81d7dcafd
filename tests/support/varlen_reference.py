"""A slow kernel of torch.nn.attention.varlen's operators for CPUs, and a switch that lets packed attention use it.

The engine takes that way on CUDA alone. Here the same code runs with numbers: segments, gather index, windows, grouped
heads and gradients are the engine's, the formula is this file's.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from heft_engine.model import varlen_attention
from heft_engine.model.layout import AttentionOptions


def use_reference(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sends packed attention on a CPU through `varlen_attn`. Returns a list that gets one entry a call: its layer."""
    _register()
    layers: list[int] = []
    attention = varlen_attention.varlen_attention

    def counted(layer: int, *arguments: Any) -> Tensor:
        layers.append(layer)
        return attention(layer, *arguments)

    monkeypatch.setattr(varlen_attention, "is_supported", _is_supported)
    monkeypatch.setattr(varlen_attention, "varlen_attention", counted)
    return layers


def _is_supported(query: Tensor, options: AttentionOptions) -> bool:
    return options.softcap is None


@cache
def _register() -> None:
    """Registers the kernels, once a process: an operator takes a kernel for a device only once."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert num_splits == 1
    assert enable_gqa or query.shape[1] == key.shape[1]
    outs, sums = [], []
    for queries, keys in _segments(cu_seq_q, cu_seq_k, max_q, max_k):
        scores, values = _scores(query[queries], key[keys], value[keys], scale, window_size)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(query.dtype))
        sums.append(torch.logsumexp(scores, -1))
    return torch.cat(outs), torch.cat(sums, 1), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of softmax attention written out: autograd does not run inside an operator."""
    gradients = [torch.empty_like(states) for states in (query, key, value)]
    width, kv_heads = query.shape[2], key.shape[1]
    for queries, keys in _segments(cu_seq_q, cu_seq_k, max_q, max_k):
        scores, values = _scores(query[queries], key[keys], value[keys], scale, window_size)
        weights = scores.softmax(-1)
        incoming = grad_out[queries].float()
        along = (incoming * out[queries].float()).sum(-1).T[:, :, None]
        change = weights * (torch.einsum("qhd,khd->hqk", incoming, values) - along) * (scale or width**-0.5)
        wide_key = key[keys].float().repeat_interleave(query.shape[1] // kv_heads, 1)
        of_key = torch.einsum("hqk,qhd->khd", change, query[queries].float())
        of_value = torch.einsum("hqk,qhd->khd", weights, incoming)
        gradients[0][queries] = torch.einsum("hqk,khd->qhd", change, wide_key).to(query.dtype)
        for gradient, of_heads in ((gradients[1], of_key), (gradients[2], of_value)):
            gradient[keys] = of_heads.unflatten(1, (kv_heads, -1)).sum(2).to(gradient.dtype)
    return gradients[0], gradients[1], gradients[2]


def _segments(cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    """Returns the places of every segment's queries and keys; their largest numbers must be those that were passed."""
    queries, keys = (
        [slice(start, end) for start, end in pairwise(starts)]
        for starts in (cu_seq_q.tolist(), cu_seq_k.tolist())
    )
    assert max(place.stop - place.start for place in queries) == max_q
    assert max(place.stop - place.start for place in keys) == max_k
    return list(zip(queries, keys, strict=True))


def _scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Returns scores (heads, Q, K), −∞ where a query does not look, and values (K, heads, head_dim), in float32.

    Query i stands at K − Q + i, as in FlashAttention 2.1 and later.
    """
    left, right = window or [-1, -1]
    count, heads, width = query.shape
    keys = key.shape[0]
    wide_key, wide_value = (
        states.float().repeat_interleave(heads // key.shape[1], 1) for states in (key, value)
    )
    distance = torch.arange(keys) - torch.arange(keys - count, keys)[:, None]
    hidden = torch.zeros(count, keys, dtype=torch.bool)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= distance < -left
    scores = torch.einsum("qhd,khd->hqk", query.float(), wide_key) * (scale or width**-0.5)
    return scores.masked_fill(hidden, float("-inf")), wide_value
