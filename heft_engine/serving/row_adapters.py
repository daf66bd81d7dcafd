"""Unmerged models on one base model: each row of a batch has a LoRA adapter and interventions of its own.

An adapted linear layer returns its base's product plus (x·Aᵀ)·(s·B)ᵀ. AMX adds that before the product is rounded
(heft_engine.cpu.amx); elsewhere it is a small pair of products a row and module, whose shapes depend on the row alone.
Either way a row's bits depend on the rows beside it only as the base's do. LoRA stages follow one another; DoRA (arXiv
2402.09353) multiplies what came before, without the bias, by m/‖W + s·B·A‖. Factors have the base model's dtype, so
scores agree with those of the merged model within its rounding and no closer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heft_engine.adapters.lora.variants import row_norms
from heft_engine.adapters.lora.weights import LoraWeights, linear_of, weight_of
from heft_engine.bundle.assemble import restore_interventions
from heft_engine.bundle.format import StoredIntervention
from heft_engine.config.train import parse_positions
from heft_engine.data.encoding import intervened_positions
from heft_engine.errors import BundleError
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.layout import AdapterHook, Layout, PackedRow, RowAdapter
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.threads import torch_threads


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One LoRA stage. Factors of equal shape are stacked in one tensor, as the headers of a thousand models' tensors
    would take more memory than their numbers.

    groups: stacked A (n, rank, in) and s·Bᵀ (n, rank, out). places[module]: (group, index in its stack).
    ratios[module]: DoRA's m/‖W + s·B·A‖, (out,).
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    places: dict[str, tuple[int, int]]
    ratios: dict[str, Tensor] | None

    @property
    def tensors(self) -> list[Tensor]:
        stacks = [tensor for group in self.groups for tensor in group]
        return stacks + list((self.ratios or {}).values())

    def factors(self, module: str) -> tuple[Tensor, Tensor, int] | None:
        """Returns the stacks that hold a module's factors and its index in them."""
        place = self.places.get(module)
        return None if place is None else (*self.groups[place[0]], place[1])


class UnmergedModel:
    """A fine-tuned model's adapters and interventions, unmerged. Implements `layout.RowAdapter`.

    Raises BundleError when they are for another base model.
    """

    def __init__(
        self, lm: PackedLM, adapters: Sequence[LoraWeights], interventions: Sequence[StoredIntervention]
    ) -> None:
        weights: dict[str, Tensor] = {}
        dora_stages = [i for i, adapter in enumerate(adapters) if adapter.magnitudes is not None]
        last_dora = max(dora_stages, default=0)
        self._stages = [
            _stage(lm, adapter, weights, updates_weights=i < last_dora) for i, adapter in enumerate(adapters)
        ]
        self.interventions = restore_interventions(interventions, lm)
        self._by_layer: dict[int, list[PlacedIntervention]] = {}
        for placed in self.interventions:
            self._by_layer.setdefault(placed.layer, []).append(placed)

    @property
    def memory_bytes(self) -> int:
        factors = [tensor for stage in self._stages for tensor in stage.tensors]
        parameters = [p for placed in self.interventions for p in placed.intervention.parameters()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*factors, *parameters))

    def touches(self, module: str) -> bool:
        return any(module in stage.places for stage in self._stages)

    def factors(self, module: str) -> list[tuple[Tensor, Tensor, int]] | None:
        factors = []
        for stage in self._stages:
            stage_factors = stage.factors(module)
            if stage_factors is not None and stage.ratios is not None:
                return None
            if stage_factors is not None:
                factors.append(stage_factors)
        return factors

    def linear(self, module: str, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        for stage in self._stages:
            factors = stage.factors(module)
            if factors is None:
                continue
            down, up, index = factors
            # Matrix products, not linear layers: those would be cut into blocks of a fixed shape.
            low = x @ down[index].T
            if stage.ratios is None:
                y.addmm_(low, up[index])
                continue
            if bias is not None:
                y.sub_(bias)
            y.addmm_(low, up[index]).mul_(stage.ratios[module])
            if bias is not None:
                y.add_(bias)

    def intervene(self, layer: int, hidden: Tensor, row: PackedRow, scale: float) -> None:
        for placed in self._by_layer.get(layer, ()):
            at = [
                position - row.cached_tokens
                for position in intervened_positions(row.prompt, *parse_positions(placed.positions))
                if row.cached_tokens <= position < row.prompt - row.unread_tokens
            ]
            if at:
                placed.intervention.to(hidden.device)
                hidden[at] = placed.intervention(hidden[at], scale)


def _stage(
    lm: PackedLM, adapter: LoraWeights, weights: dict[str, Tensor], *, updates_weights: bool
) -> _Stage:
    """Stacks an adapter's factors.

    `weights` are the float32 weights after the stages before; `updates_weights` merges this one for a later DoRA stage.
    """
    places: dict[str, tuple[int, int]] = {}
    grouped: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for module, (down, up) in adapter.factors.items():
        linear, shape = linear_of(lm.model, module), (up.shape[0], down.shape[1])
        expected = (linear.out_features, linear.in_features)
        if shape != expected:
            raise BundleError(f"the adapter's {module} is {shape}, the base's {expected}")
        key = (down.shape, up.shape)
        members = grouped.setdefault(key, [])
        places[module] = (list(grouped).index(key), len(members))
        members.append((down, up.T))
    groups = tuple(
        (
            _stacked([down for down, _ in members], 1.0, lm),
            _stacked([up for _, up in members], adapter.scaling, lm),
        )
        for members in grouped.values()
    )
    ratios = _ratios(lm, adapter, weights)
    if updates_weights:
        for module in adapter.factors:
            weights[module] = adapter.merged(module, _weight(lm, weights, module))
    return _Stage(places=places, groups=groups, ratios=ratios)


def _stacked(tensors: list[Tensor], scaling: float, lm: PackedLM) -> Tensor:
    """Returns scaling · tensors, stacked. Each is rounded straight into its place: temporary tensors of a thousand
    models would leave holes in the heap. Raises BundleError for values that are not finite."""
    stacked = torch.empty(len(tensors), *tensors[0].shape, dtype=lm.dtype, device=lm.device)
    for place, tensor in zip(stacked, tensors, strict=True):
        place.copy_(tensor if scaling == 1.0 else scaling * tensor)
    if not stacked.isfinite().all():
        raise BundleError(f"the adapter has factors that are no finite numbers in {lm.dtype}")
    return stacked


def _ratios(lm: PackedLM, adapter: LoraWeights, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns DoRA's m/‖W + s·B·A‖ of each module; None for LoRA."""
    if adapter.magnitudes is None:
        return None
    ratios = {}
    for module, magnitude in adapter.magnitudes.items():
        norms = row_norms(_weight(lm, weights, module) + adapter.delta(module))
        ratios[module] = (magnitude / norms).to(device=lm.device, dtype=lm.dtype)
    return ratios


def _weight(lm: PackedLM, weights: dict[str, Tensor], module: str) -> Tensor:
    """Returns a module's float32 weight after the stages in `weights`."""
    return weights[module] if module in weights else weight_of(lm.model, module).detach().float().cpu()


class _CurrentPass(threading.local):
    """The layout of the pass that a thread runs and its rows with adapters, set by the first layer for the others."""

    layout: Layout | None = None
    rows: Sequence[tuple[PackedRow, RowAdapter, float]] = ()

    def enter(self, layout: Layout | None) -> None:
        if layout is not self.layout:
            self.layout = layout
            self.rows = _adapted_rows(layout) if layout is not None else ()


def enable_row_adapters(lm: PackedLM) -> None:
    """Hooks a base model's layers so that they apply `Layout.adapters`. Rows without an adapter keep their bits."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    current = _CurrentPass()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layout = kwargs.get("layout")
        current.enter(layout if layout is not None and layout.adapters is not None else None)

    for index, layer in enumerate(lm.layers):
        layer.register_forward_pre_hook(begin, with_kwargs=True)
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(_LinearHook(names[id(module)], current))
        layer.register_forward_hook(_layer_hook(index, current, is_last=index + 1 == lm.n_layers))


class _LinearHook(AdapterHook):
    def __init__(self, name: str, current: _CurrentPass) -> None:
        self.name = name
        self._current = current

    def __call__(self, module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        adapted = [(row, adapter) for row, adapter, _ in self._current.rows if adapter.touches(self.name)]
        if adapted:
            self.adapt(adapted, module, args[0], output)

    def adapt(
        self, rows: Sequence[tuple[PackedRow, RowAdapter]], module: nn.Linear, x: Tensor, y: Tensor
    ) -> None:
        # A torch function mode would take longer than these small products, and several threads might round them
        # otherwise.
        with torch._C.DisableTorchFunction(), torch_threads(1):
            x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for row, adapter in rows:
                tokens = slice(row.start, row.start + row.length)
                adapter.linear(self.name, x[tokens], y[tokens], module.bias)


def _layer_hook(index: int, current: _CurrentPass, *, is_last: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        for row, adapter, scale in current.rows:
            if scale:
                adapter.intervene(index, output[0, row.start : row.start + row.length], row, scale)
        if is_last:
            current.enter(None)  # an idle thread must not keep evicted models in memory

    return hook


def _adapted_rows(layout: Layout) -> list[tuple[PackedRow, RowAdapter, float]]:
    scales = layout.scales or (layout.scale,) * len(layout.rows)
    rows = zip(layout.rows, layout.adapters or (), scales, strict=True)
    return [(row, adapter, scale) for row, adapter, scale in rows if adapter is not None]
