"""Decoder layers for passes that only answer, on a CPU: the layer's products (heft_engine.cpu.fused_linear), and what
stands between them by compiled kernels (heft_engine.cpu.fused_ops).

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

from heft_engine.cpu import operators, packed_weights
from heft_engine.cpu.amx import Norm
from heft_engine.cpu.fused_linear import LayerProducts
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.model.attention import amx_attention, amx_for, packed_attention, tiled_attention, tiles_of
from heft_engine.model.packing import Layout, PackedRow

#: Rows that a layer is tried with: attention of one length and of another, and more tokens than one block of a product.
_TRIED = (7, 41)
_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn"),
}
#: Norms that stand where these layers have none.
_OTHERS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

Forward = Callable[..., Tensor]


class FusedLayers:
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
        compiled = operators.fused_ops() if all(map(_fits, layers)) else None
        self._forwards: dict[nn.Module, Forward] = {}
        self._lock, self._inside = threading.Lock(), 0
        asked: dict[str, dict[str, Any] | None] = {}
        for layer, kind in zip(layers, kinds, strict=True) if compiled is not None else ():
            if kind not in asked:
                asked[kind] = _options(layer, kind, rotary, cast(FusedOps, compiled))
            options = asked[kind]
            if options is not None:
                self._forwards[layer] = _Layer(layer, options, cast(FusedOps, compiled))

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


class _Layer:
    """One layer's quick pass; `asked`: how it asks for attention."""

    def __init__(self, layer: Any, asked: dict[str, Any], compiled: FusedOps) -> None:
        self._attention, self._mlp, self._asked, self._compiled = layer.self_attn, layer.mlp, asked, compiled
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._products = LayerProducts()
        self._is_silu = isinstance(self._mlp.act_fn, (nn.SiLU, SiLUActivation))

    def __call__(
        self, states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], layout: Layout, **_: Any
    ) -> Tensor:
        # Where all products are the units', a mode has a say in nothing, and looking at everything takes it as long as
        # a short pass.
        with torch._C.DisableTorchFunction():
            out = self._on_amx(states, position_embeddings, layout)
        return (
            self.in_parts(states, position_embeddings=position_embeddings, layout=layout)
            if out is None
            else out
        )

    def _on_amx(self, states: Tensor, turned: tuple[Tensor, Tensor], layout: Layout) -> Tensor | None:
        """The layer in four goes; None where that can't be had."""
        heads, last, gates = self._heads, self._attention.o_proj, self._gates
        parts = [*heads, last, *gates]
        amx_ops = self._products.amx_for(*parts) if self._is_silu else None
        if amx_ops is None or any(part.bias is not None for part in gates):
            return None
        added = self._products.lora_deltas(parts, layout)
        if added is None:
            return None
        products = self._products.projections(amx_ops, states, self._first, heads, added[:3])
        seen = self._attended(*self._by_head(products), turned, layout)
        seen = seen.reshape(*states.shape[:2], -1)
        after = amx_ops.linear(
            seen, last.weight, packed_weights.packed_copy(last.weight), last.bias, states, added[3]
        )
        return self._products.gated(amx_ops, after, self._second, gates, added[4:])

    def in_parts(
        self, states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], layout: Layout
    ) -> Tensor:
        """The layer, one operation after the other."""
        hidden = self._compiled.rms_norm(states, *self._first)
        products = [self._products.linear(part, hidden, layout) for part in self._heads]
        # Attention is a hundred small operations, none of which a mode has a say in.
        with torch._C.DisableTorchFunction():
            seen = self._attended(*self._by_head(products), position_embeddings, layout)
        after = self._products.linear(self._attention.o_proj, seen.reshape(*states.shape[:2], -1), layout)
        hidden = self._compiled.add_rms_norm(states, after, *self._second)
        gate_proj, up_proj, down_proj = self._gates
        gate, up = (self._products.linear(part, hidden, layout) for part in (gate_proj, up_proj))
        active = self._compiled.gate_silu(gate, up) if self._is_silu else self._mlp.act_fn(gate).mul_(up)
        return self._products.linear(down_proj, active, layout).add_(after)

    @property
    def _heads(self) -> list[nn.Linear]:
        return [self._attention.q_proj, self._attention.k_proj, self._attention.v_proj]

    @property
    def _gates(self) -> list[nn.Linear]:
        return [self._mlp.gate_proj, self._mlp.up_proj, self._mlp.down_proj]

    def _by_head(self, products: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (1, T, …) each → (T, heads, head_dim), normed where the layer norms them."""
        own = self._attention
        query, key, value = (each.view(each.shape[1], -1, own.head_dim) for each in products)
        if (norm := getattr(own, "q_norm", None)) is not None:
            query = self._compiled.rms_norm(query, norm.weight, norm.variance_epsilon)
        if (norm := getattr(own, "k_norm", None)) is not None:
            key = self._compiled.rms_norm(key, norm.weight, norm.variance_epsilon)
        return query, key, value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        """As functions: who copies a model during a pass takes it off the copy (heft_engine.serving.shared_copy)."""
        return self

    @property
    def _first(self) -> Norm:
        return Norm(self._norms[0].weight, self._norms[0].variance_epsilon)

    @property
    def _second(self) -> Norm:
        return Norm(self._norms[1].weight, self._norms[1].variance_epsilon)

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, turned: tuple[Tensor, Tensor], layout: Layout
    ) -> Tensor:
        """(T, heads, head_dim), cosine and sine `turned` → (T, heads, head_dim)."""
        asked, index = self._asked, cast(int, self._attention.layer_idx)
        amx_ops = amx_for(layout, query, key, value, asked["softcap"])
        tiles = tiles_of(layout, query) if amx_ops is None else None
        where = layout.in_order if tiles is None else (tiles.places, tiles.gaps)
        query, key = (self._compiled.rotate(each, *turned, *where) for each in (query, key))
        if amx_ops is not None:
            options = (asked["scaling"], asked["sliding_window"])
            return amx_attention(amx_ops, index, query, key, value, layout, *options)
        if tiles is not None:
            value = self._compiled.place(value, *where)
            return tiled_attention(index, query, key, value, layout, tiles, **asked)
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        return packed_attention(self._attention, q, k, v, None, layout=layout, **asked)[0]


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
    compiled: FusedOps,
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
    quick = _Layer(layer, asked.options, compiled)
    expected = own(layout)
    # Some passes run a layer in parts (adapters with DoRA): the others must not differ.
    for run in (quick, quick.in_parts):
        if not torch.equal(run(states, position_embeddings=turned, layout=layout), expected):
            return None
    return asked.options
