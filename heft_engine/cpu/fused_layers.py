"""Decoder layers of passes without a gradient, as a few compiled operators: AMX products with norms, activations and
LoRA deltas in them (heft_engine.cpu.fused_linear), and AMX attention. Without AMX the modules' own forward runs: norms
and rotary embeddings alone gained less than 6 % (docs/serving.md).

The layers are those of Llama and its kin: norm, query, key and value, rotary embedding, attention, sum, norm, gated
activation, sum. A layer of each type that a model has is compared with its module's own `forward`, to the bit; where
they differ, the modules' own run. Hooks on layers and on linear layers act as ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from heft_engine.cpu import amx_attention, operators, packed_weights
from heft_engine.cpu.amx import Norm
from heft_engine.cpu.fused_linear import LayerProducts
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.model.attention import packed_attention
from heft_engine.model.backend import DecoderLayers, TorchBackend
from heft_engine.model.layout import AttentionOptions, Layout, PackedRow
from heft_engine.runtime.parallel import all_threads, one_thread

#: Rows that a layer is compared with: attention of two lengths, and more tokens than one block of a product.
_COMPARED = (7, 41)
_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn"),
}
#: Norms of other families, which stand where these layers have none.
_OTHER_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

Forward = Callable[..., Tensor]


class FusedLayers:
    """The fused forward passes of a model's layers, as far as there are any."""

    def __init__(self, layers: DecoderLayers, backend: TorchBackend) -> None:
        self._forwards: dict[nn.Module, Forward] = {}
        self._lock, self._threads = threading.Lock(), 0
        fused_ops = operators.fused_ops()
        if fused_ops is None or operators.amx_ops() is None or not all(map(_fits, layers.modules)):
            return
        options: dict[str, AttentionOptions | None] = {}
        for layer, kind in zip(layers.modules, layers.types, strict=True):
            if kind not in options:
                options[kind] = _attention_options(layer, kind, layers, backend, fused_ops)
            how = options[kind]
            if how is not None:
                self._forwards[layer] = _Layer(layer, how, fused_ops, backend.is_batch_invariant)

    def __len__(self) -> int:
        return len(self._forwards)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers run fused: until the last of several threads has left."""
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                for layer, forward in self._forwards.items():
                    layer.__dict__["forward"] = forward  # a hundred times quicker than a module's setattr
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0:
                    for layer in self._forwards:
                        layer.__dict__.pop("forward", None)


def _fits(layer: nn.Module) -> bool:
    """Returns True if a layer has the parts, on a CPU in bfloat16."""
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return (
        all(_epsilon(norm) is not None for norm in norms)
        and all(hasattr(getattr(layer, part, None), name) for part, names in _PARTS.items() for name in names)
        and not any(hasattr(layer, name) for name in _OTHER_NORMS)
        and all(p.device.type == "cpu" for p in layer.parameters())
        and cast(nn.Module, layer.input_layernorm).weight.dtype == torch.bfloat16
    )


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", None)


class _Layer:
    """One layer's fused pass; `options`: how it attends."""

    def __init__(
        self, layer: Any, options: AttentionOptions, fused_ops: FusedOps, is_batch_invariant: bool
    ) -> None:
        self._attention_threads = one_thread if is_batch_invariant else nullcontext
        self._attention, self._mlp, self._options, self._ops = layer.self_attn, layer.mlp, options, fused_ops
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._linears = LayerProducts()
        self._is_silu = isinstance(self._mlp.act_fn, (nn.SiLU, SiLUActivation))

    def __call__(
        self, states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], layout: Layout, **_: Any
    ) -> Tensor:
        # A mode has no say in AMX operators, and its looking at every call would take as long as a short pass.
        with all_threads(), torch._C.DisableTorchFunction():
            out = self._fused(states, position_embeddings, layout)
        return self.in_parts(states, position_embeddings, layout) if out is None else out

    def _fused(self, states: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor | None:
        """The layer in four operators; None where AMX does not support all of it, adapters included."""
        qkv, output, mlp = self._qkv, self._attention.o_proj, self._gate_up_down
        linears = [*qkv, output, *mlp]
        amx = self._linears.amx_for(*linears) if self._is_silu else None
        if amx is None or any(linear.bias is not None for linear in mlp):
            return None
        deltas = self._linears.lora_deltas(linears, layout)
        if deltas is None:
            return None
        projections = self._linears.projections(amx, states, self._norm(0), qkv, deltas[:3])
        attended = self._attend(projections, rotary, layout).reshape(*states.shape[:2], -1)
        packed = packed_weights.packed_copy(output.weight)
        states = amx.linear(attended, output.weight, packed, output.bias, states, deltas[3])
        return self._linears.gated(amx, states, self._norm(1), mlp, deltas[4:])

    def in_parts(self, states: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """The same, one operation after the other: with adapters that are more than a LoRA delta."""
        hidden = self._ops.rms_norm(states, *self._norm(0))
        projections = [self._linears.linear(linear, hidden, layout) for linear in self._qkv]
        with torch._C.DisableTorchFunction():
            attended = self._attend(projections, rotary, layout).reshape(*states.shape[:2], -1)
        states = states + self._linears.linear(self._attention.o_proj, attended, layout)
        hidden = self._ops.rms_norm(states, *self._norm(1))
        gate_proj, up_proj, down_proj = self._gate_up_down
        gate, up = (self._linears.linear(linear, hidden, layout) for linear in (gate_proj, up_proj))
        return states + self._linears.linear(down_proj, self._mlp.act_fn(gate) * up, layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        """Returns itself, as functions do: heft_engine.serving.shared_copy takes it off a copied model."""
        return self

    @property
    def _qkv(self) -> list[nn.Linear]:
        return [self._attention.q_proj, self._attention.k_proj, self._attention.v_proj]

    @property
    def _gate_up_down(self) -> list[nn.Linear]:
        return [self._mlp.gate_proj, self._mlp.up_proj, self._mlp.down_proj]

    def _norm(self, index: int) -> Norm:
        return Norm(self._norms[index].weight, self._norms[index].variance_epsilon)

    def _attend(self, projections: Sequence[Tensor], rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """Query, key and value, (1, T, heads · head_dim) each → (T, heads, head_dim)."""
        module = self._attention
        query, key, value = (states.view(states.shape[1], -1, module.head_dim) for states in projections)
        if (norm := getattr(module, "q_norm", None)) is not None:
            query = self._ops.rms_norm(query, norm.weight, norm.variance_epsilon)
        if (norm := getattr(module, "k_norm", None)) is not None:
            key = self._ops.rms_norm(key, norm.weight, norm.variance_epsilon)
        query, key = (self._ops.rotate(states, *rotary) for states in (query, key))
        amx = amx_attention.amx_for(layout, query, key, value, self._options)
        if amx is not None:
            layer = cast(int, module.layer_idx)
            with all_threads():
                return amx_attention.attend(amx, layer, query, key, value, layout, self._options)
        q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
        scaling, window, softcap = self._options
        with self._attention_threads():
            return packed_attention(
                module, q, k, v, None, layout=layout, scaling=scaling, sliding_window=window, softcap=softcap
            )[0]


class _RecordOptions:
    """Stands in for attention once, to record how a layer attends. See `layout.DecodeStep`."""

    options = AttentionOptions()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.options = options
        return query.transpose(1, 2)


@torch.inference_mode()
def _attention_options(
    layer: Any, kind: str, layers: DecoderLayers, backend: TorchBackend, fused_ops: FusedOps
) -> AttentionOptions | None:
    """Returns how a layer attends; None where the fused pass gives other bits than the layer's own `forward`."""
    starts = [sum(_COMPARED[:index]) for index in range(len(_COMPARED))]
    rows = tuple(
        PackedRow(start=start, prompt=length, branches=())
        for start, length in zip(starts, _COMPARED, strict=True)
    )
    width = layer.input_layernorm.weight.shape[0]
    states = torch.randn(1, sum(_COMPARED), width, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.cat([torch.arange(length) for length in _COMPARED])[None]
    rotary = layers.rotary(states, positions, kind)
    if rotary[0].shape[-1] != layer.self_attn.head_dim:
        return None

    def own_forward(layout: Layout) -> Tensor:
        options: dict[str, Any] = {"attention_mask": None, "position_ids": positions, "use_cache": False}
        options |= {"position_embeddings": rotary, "layout": layout, "backend": backend}
        return cast(Tensor, type(layer).forward(layer, states, **options))

    record = _RecordOptions()
    own_forward(Layout(rows=rows, decoding=record))
    layout = Layout(rows=rows)
    fused = _Layer(layer, record.options, fused_ops, backend.is_batch_invariant)
    expected = own_forward(layout)
    same = torch.equal(fused(states, position_embeddings=rotary, layout=layout), expected)
    return record.options if same and torch.equal(fused.in_parts(states, rotary, layout), expected) else None
