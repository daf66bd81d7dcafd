"""The products of decoder layers, with what the rows' adapters add to them: on a CPU's matrix units where these can do
it (heft_engine.cpu.amx), by the linear layers themselves elsewhere, with hooks and all.

A row's bits don't depend on the rows beside it, nor on whether the layer runs in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from heft_engine.cpu import operators, packed_weights
from heft_engine.cpu.amx import AmxOps, LoraDelta, Norm, Projection
from heft_engine.model.layout import AdapterHook, Layout, PackedRow, RowAdapter
from heft_engine.runtime.parallel import all_threads

#: Rows whose adapters do more than a product can add.
Others = list[tuple[PackedRow, RowAdapter]]


class LayerProducts:
    """Products of bfloat16 states (1, T, in), without a gradient."""

    def __init__(self) -> None:
        self._amx = operators.amx_ops()

    def amx_for(self, *modules: nn.Module) -> AmxOps | None:
        """The AMX operators, if they support all of these and nothing but products and adapters happens in them."""
        amx_ops = self._amx
        fits = amx_ops is not None and all(
            _is_plain(module) and amx_ops.supports(cast(Tensor, module.weight)) for module in modules
        )
        return amx_ops if fits else None

    def linear(self, module: nn.Linear, x: Tensor, layout: Layout) -> Tensor:
        """The module's output for x, adapted: (1, T, out)."""
        amx_ops = self.amx_for(module)
        if amx_ops is None:
            return cast(Tensor, module(x))
        lora_deltas, others = _adapters(module, layout)
        packed = packed_weights.packed_copy(module.weight)
        with all_threads():
            out = amx_ops.linear(x, module.weight, packed, module.bias, None, lora_deltas)
        if others:
            _hook(module).adapt(others, module, x, out)
        return out

    def lora_deltas(self, modules: Sequence[nn.Linear], layout: Layout) -> list[list[LoraDelta]] | None:
        """Returns the LoRA deltas of each product; None if an adapter of a row does more than add."""
        adapters = [_adapters(module, layout) for module in modules]
        return None if any(others for _, others in adapters) else [lora_deltas for lora_deltas, _ in adapters]

    @staticmethod
    def projections(
        amx_ops: AmxOps,
        states: Tensor,
        norm: Norm,
        modules: Sequence[nn.Linear],
        lora_deltas: Sequence[Sequence[LoraDelta]],
    ) -> list[Tensor]:
        """Returns, of norm(states), the output of each module that `amx_for` has found, with the LoRA deltas to it."""
        projections = [
            Projection(module.weight, packed_weights.packed_copy(module.weight), module.bias, more)
            for module, more in zip(modules, lora_deltas, strict=True)
        ]
        return amx_ops.norm_linears(states, norm, projections)

    @staticmethod
    def gated(
        amx_ops: AmxOps,
        states: Tensor,
        norm: Norm,
        modules: Sequence[nn.Linear],
        lora_deltas: Sequence[Sequence[LoraDelta]],
    ) -> Tensor:
        """states + down(SiLU(gate(x)) ⊙ up(x)) of x = norm(states), with the LoRA deltas to each product.

        modules: gate, up and down, without biases, as `amx_for` has found them.
        """
        gate, up, down = (module.weight for module in modules)
        copies = [copy for w in (gate, up, down) if (copy := packed_weights.packed_copy(w)) is not None]
        packed = (copies[0], copies[1], copies[2]) if len(copies) == len(modules) else None
        deltas = (lora_deltas[0], lora_deltas[1], lora_deltas[2])
        return amx_ops.gated_mlp(states, norm, (gate, up, down), packed, deltas)


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    return all(isinstance(hook, AdapterHook) for hook in module._forward_hooks.values())


def _hook(module: nn.Module) -> AdapterHook:
    hooks: list[object] = list(module._forward_hooks.values())
    return next(hook for hook in hooks if isinstance(hook, AdapterHook))


def _adapters(module: nn.Module, layout: Layout) -> tuple[list[LoraDelta], Others]:
    lora_deltas: list[LoraDelta] = []
    others: Others = []
    if layout.adapters is None or not module._forward_hooks:
        return lora_deltas, others
    name = _hook(module).name
    for row, adapter in zip(layout.rows, layout.adapters, strict=True):
        if adapter is None or not adapter.touches(name):
            continue
        factors = adapter.factors(name)
        if factors is None:
            others.append((row, adapter))
        else:
            lora_deltas += [LoraDelta(row.start, row.length, *each) for each in factors]
    return lora_deltas, others
