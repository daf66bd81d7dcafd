"""Decoder layers for passes that only answer, on a CPU: products by the layer's own modules, what stands between them
by compiled kernels (heft_engine.kernels).

The layers are those of Llama and its kin: norm, query, key and value, rotary embedding, attention, sum, norm, gated
activation, sum. A layer of each kind that a model has is held to its module's own `forward`, to the bit; where they
differ, or where there are no kernels, the modules' own run. Hooks on layers and on products act as ever. It does NOT
know training: nothing here has a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from heft_engine import kernels, matrix_units, packed_weights
from heft_engine.attention import packed_attention, tiled_attention, tiles_of, units_attention, units_of
from heft_engine.matrix_units import Addition, Norm, Projection
from heft_engine.packing import AdapterHook, Layout, PackedRow, RowAdapter

#: Rows that a layer is tried with: attention of one length and of another, and more tokens than one block of a product.
_TRIED = (7, 41)
_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn"),
}
#: Norms that stand where these layers have none.
_OTHERS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

Forward = Callable[..., Tensor]


class QuickLayers:
    """The quick forward passes of a model's layers, as far as there are any.

    `rotary(states, positions, kind)` gives cosine and sine; `kinds`, of each layer: layers of one kind differ in their
    weights alone.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        kinds: Sequence[str],
        rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]],
    ) -> None:
        compiled = kernels.load() if all(map(_fits, layers)) else None
        self._forwards: dict[nn.Module, Forward] = {}
        self._lock, self._inside = threading.Lock(), 0
        asked: dict[str, dict[str, Any] | None] = {}
        for layer, kind in zip(layers, kinds, strict=True) if compiled is not None else ():
            if kind not in asked:
                asked[kind] = _options(layer, kind, rotary, cast(kernels.Kernels, compiled))
            options = asked[kind]
            if options is not None:
                self._forwards[layer] = _forward(layer, options, cast(kernels.Kernels, compiled))

    def __len__(self) -> int:
        return len(self._forwards)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers run so: until the last of several threads has left."""
        self._enter(1)
        try:
            yield
        finally:
            self._enter(-1)

    def _enter(self, more: int) -> None:
        with self._lock:
            self._inside += more
            for layer, forward in self._forwards.items() if (self._inside, more) == (1, 1) else ():
                layer.__dict__["forward"] = forward  # a hundred times quicker than a module's own way
            for layer in self._forwards if self._inside == 0 else ():
                layer.__dict__.pop("forward", None)


def _fits(layer: nn.Module) -> bool:
    """Whether a layer has the parts, on a CPU in bfloat16."""
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return (
        all(_epsilon(norm) is not None for norm in norms)
        and all(hasattr(getattr(layer, part, None), name) for part, names in _PARTS.items() for name in names)
        and not any(hasattr(layer, name) for name in _OTHERS)
        and all(p.device.type == "cpu" for p in layer.parameters())
        and cast(nn.Module, layer.input_layernorm).weight.dtype == torch.bfloat16
    )


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", None)


def _forward(layer: Any, asked: dict[str, Any], compiled: kernels.Kernels) -> Forward:
    attention, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    layer_index: int = attention.layer_idx
    units = matrix_units.load()
    is_silu = isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))

    def by_units(module: Any) -> matrix_units.MatrixUnits | None:
        """The units, if nothing but their product and adapters happens in a linear layer."""
        return units if units is not None and _is_plain(module) and units.takes(module.weight) else None

    def linear(module: Any, x: Tensor, layout: Layout, residual: Tensor | None = None) -> Tensor:
        """The module's product, adapted, and the sum with `residual`."""
        if (own := by_units(module)) is None:
            out = cast(Tensor, module(x))
        else:
            additions, others = _adapters(module, layout)
            kept, at_once = packed_weights.kept(module.weight), None if others else residual
            out = own.product(x, module.weight, kept, module.bias, at_once, additions)
            if not others:
                return out
            _hook(module).adapt(others, module, x, out)
        return out if residual is None else out.add_(residual)

    def projected(states: Tensor, layout: Layout) -> list[Tensor]:
        """Query, key and value, (T, heads, head_dim) each."""
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None), None)
        own = by_units(parts[0])
        adapters = [_adapters(part, layout) for part in parts] if own and all(map(by_units, parts)) else []
        if own is not None and adapters and not any(others for _, others in adapters):
            asked_for = [
                Projection(part.weight, packed_weights.kept(part.weight), part.bias, additions)
                for part, (additions, _) in zip(parts, adapters, strict=True)
            ]
            products = own.projections(states, Norm(first.weight, first.variance_epsilon), asked_for)
        else:
            hidden = compiled.rms_norm(states, first.weight, first.variance_epsilon)
            products = [linear(part, hidden, layout) for part in parts]
        found = [each.view(states.shape[1], -1, attention.head_dim) for each in products]
        return [
            each if norm is None else compiled.rms_norm(each, norm.weight, norm.variance_epsilon)
            for each, norm in zip(found, norms, strict=True)
        ]

    def attended(
        query: Tensor, key: Tensor, value: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: Layout
    ) -> Tensor:
        """(T, heads, head_dim) each → (T, heads, head_dim)."""
        cosine, sine = position_embeddings
        on_units = units_of(layout, query, asked["softcap"])
        tiles = tiles_of(layout, query) if on_units is None else None
        where = layout.in_order if tiles is None else (tiles.places, tiles.gaps)
        query, key = (compiled.rotate(each, cosine, sine, *where) for each in (query, key))
        if on_units is not None:
            options = (asked["scaling"], asked["sliding_window"])
            return units_attention(on_units, layer_index, query, key, value, layout, *options)
        if tiles is not None:
            value = compiled.place(value, *where)
            return tiled_attention(layer_index, query, key, value, layout, tiles, **asked)
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        return packed_attention(attention, q, k, v, None, layout=layout, **asked)[0]

    def gated(states: Tensor, layout: Layout) -> Tensor | None:
        """The layer's second half in one go, where it can be had."""
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        own = by_units(parts[0])
        if own is None or not is_silu or not all(by_units(part) and part.bias is None for part in parts):
            return None
        adapters = [_adapters(part, layout) for part in parts]
        if any(others for _, others in adapters):
            return None
        gate, up, down = (part.weight for part in parts)
        packed = [found for w in (gate, up, down) if (found := packed_weights.kept(w)) is not None]
        kept = (packed[0], packed[1], packed[2]) if len(packed) == len(parts) else None
        added = (adapters[0][0], adapters[1][0], adapters[2][0])
        return own.gated(states, Norm(second.weight, second.variance_epsilon), (gate, up, down), kept, added)

    def forward(
        states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], layout: Layout, **_: Any
    ) -> Tensor:
        query, key, value = projected(states, layout)
        # Attention is a hundred small operations, none of which a mode has a say in.
        with torch._C.DisableTorchFunction():
            seen = attended(query, key, value, position_embeddings, layout).reshape(*states.shape[:2], -1)
        if by_units(attention.o_proj) is not None:
            after = linear(attention.o_proj, seen, layout, states)
            if (out := gated(after, layout)) is not None:
                return out
            hidden = compiled.rms_norm(after, second.weight, second.variance_epsilon)
        else:
            after = attention.o_proj(seen)
            hidden = compiled.add_rms_norm(states, after, second.weight, second.variance_epsilon)
        gate, up = linear(mlp.gate_proj, hidden, layout), linear(mlp.up_proj, hidden, layout)
        active = compiled.gate_silu(gate, up) if is_silu else mlp.act_fn(gate).mul_(up)
        return linear(mlp.down_proj, active, layout, after)

    return forward


def _is_plain(module: Any) -> bool:
    """Whether nothing but its product and adapters happens in a linear layer."""
    if type(module) is not nn.Linear or module._forward_pre_hooks:
        return False
    return all(isinstance(hook, AdapterHook) for hook in module._forward_hooks.values())


def _hook(module: nn.Linear) -> AdapterHook:
    return cast(AdapterHook, next(iter(module._forward_hooks.values())))


def _adapters(module: nn.Linear, layout: Layout) -> tuple[list[Addition], list[tuple[PackedRow, RowAdapter]]]:
    """What the rows' adapters add to a layer's product, and the rows whose adapters do more than that."""
    additions: list[Addition] = []
    others: list[tuple[PackedRow, RowAdapter]] = []
    if layout.adapters is None or not module._forward_hooks:
        return additions, others
    name = _hook(module).name
    for row, adapter in zip(layout.rows, layout.adapters, strict=True):
        if adapter is None or not adapter.touches(name):
            continue
        factors = adapter.factors(name)
        if factors is None:
            others.append((row, adapter))
        else:
            additions += [Addition(row.start, row.length, *each) for each in factors]
    return additions, others


class _Asked:
    """Stands for attention once, to hear how a layer asks for it. See `packing.Decoding`."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self.options = {"scaling": scaling, "sliding_window": window, "softcap": softcap}
        return query.transpose(1, 2)


@torch.inference_mode()
def _options(
    layer: Any,
    kind: str,
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]],
    compiled: kernels.Kernels,
) -> dict[str, Any] | None:
    """How a layer asks for attention; None where the quick pass gives other bits than the layer's own."""
    width = layer.input_layernorm.weight.shape[0]
    starts = [sum(_TRIED[:index]) for index in range(len(_TRIED))]
    rows = tuple(
        PackedRow(start=start, prompt=length, branches=())
        for start, length in zip(starts, _TRIED, strict=True)
    )
    states = torch.randn(1, sum(_TRIED), width, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.cat([torch.arange(length) for length in _TRIED])[None]
    turned = rotary(states, positions, kind)
    if turned[0].shape[-1] != layer.self_attn.head_dim:
        return None

    def own(layout: Layout) -> Tensor:
        return cast(
            Tensor,
            type(layer).forward(
                layer,
                states,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=turned,
                use_cache=False,
                layout=layout,
            ),
        )

    asked = _Asked()
    own(Layout(rows=rows, decoding=asked))
    layout = Layout(rows=rows)
    quick = _forward(layer, asked.options, compiled)(states, position_embeddings=turned, layout=layout)
    return asked.options if torch.equal(quick, own(layout)) else None
