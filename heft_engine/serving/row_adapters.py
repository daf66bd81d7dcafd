"""One base in memory, and for each row of a batch its own LoRA and its own interventions, unmerged.

A row's product is its base's plus (x·Aᵀ)·(s·B)ᵀ. Where a CPU's matrix units do it, they add that before the product is
rounded (heft_engine.cpu.amx); elsewhere it is one small pair of products a row and module, whose shapes depend on
the row alone. Either way a row's bits don't depend on the rows beside it. Stages follow one another; DoRA (arXiv
2402.09353) multiplies what came before by m/‖W + s·B·A‖, bias aside. Factors are kept in the base's dtype, so an answer
agrees with the merged model's within that dtype's rounding and no closer.

It does NOT know batches, budgets or where adapters come from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heft_engine.adapters.lora.variants import row_norms
from heft_engine.adapters.lora.weights import LoraWeights, weight_of
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
    """Factors of equal shape stand in one tensor: a thousand models of sixty modules would be mostly headers.

    places[module] = (group, index); groups: (n, rank, in) and (n, rank, out), the latter times s.
    """

    places: dict[str, tuple[int, int]]
    groups: tuple[tuple[Tensor, Tensor], ...]
    #: DoRA: m/‖W + s·B·A‖ of each module, (out,).
    ratios: dict[str, Tensor] | None

    @property
    def tensors(self) -> list[Tensor]:
        return [each for group in self.groups for each in group] + list((self.ratios or {}).values())


class UnmergedModel:
    """A fine-tuned model as what it adds to its base. See `packing.RowAdapter`.

    Raises BundleError for adapters and interventions of another base.
    """

    def __init__(
        self, lm: PackedLM, adapters: Sequence[LoraWeights], interventions: Sequence[StoredIntervention]
    ) -> None:
        weights: dict[str, Tensor] = {}
        last_dora = max((i for i, each in enumerate(adapters) if each.magnitudes is not None), default=0)
        self._stages = [
            _stage(lm, adapter, weights, followed=index < last_dora) for index, adapter in enumerate(adapters)
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
            place = stage.places.get(module)
            if place is not None and stage.ratios is not None:
                return None
            if place is not None:
                factors.append((*stage.groups[place[0]], place[1]))
        return factors

    def linear(self, module: str, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        for stage in self._stages:
            place = stage.places.get(module)
            if place is None:
                continue
            down, up = stage.groups[place[0]]
            # As matrix products, not linear layers: those would be cut into the fixed shapes of scoring.
            low = x @ down[place[1]].T
            if stage.ratios is None:
                y.addmm_(low, up[place[1]])
                continue
            if bias is not None:
                y.sub_(bias)
            y.addmm_(low, up[place[1]]).mul_(stage.ratios[module])
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


def _stage(lm: PackedLM, adapter: LoraWeights, weights: dict[str, Tensor], *, followed: bool) -> _Stage:
    """`weights`: float32 weights as the stages before left them; `followed`: a later stage, DoRA's, asks for them."""
    places: dict[str, tuple[int, int]] = {}
    grouped: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for module, (down, up) in adapter.factors.items():
        expected = weight_of(lm.model, module).shape
        if (up.shape[0], down.shape[1]) != expected:
            shape = (up.shape[0], down.shape[1])
            raise BundleError(f"the adapter's {module} is {shape}, the base's {tuple(expected)}")
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
    if followed:
        for module in adapter.factors:
            weights[module] = adapter.merged(module, _weight(lm, weights, module))
    return _Stage(places=places, groups=groups, ratios=ratios)


def _stacked(tensors: list[Tensor], scaling: float, lm: PackedLM) -> Tensor:
    """scaling · tensors, one after another. Each is rounded straight into its place: what a thousand models need only
    while they are loaded would stay between them as holes."""
    stacked = torch.empty(len(tensors), *tensors[0].shape, dtype=lm.dtype, device=lm.device)
    for place, tensor in zip(stacked, tensors, strict=True):
        place.copy_(tensor if scaling == 1.0 else scaling * tensor)
    if not stacked.isfinite().all():
        raise BundleError(f"the adapter has factors that are no finite numbers in {lm.dtype}")
    return stacked


def _ratios(lm: PackedLM, adapter: LoraWeights, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    if adapter.magnitudes is None:
        return None
    ratios = {}
    for module, magnitude in adapter.magnitudes.items():
        norms = row_norms(_weight(lm, weights, module) + adapter.delta(module))
        ratios[module] = (magnitude / norms).to(device=lm.device, dtype=lm.dtype)
    return ratios


def _weight(lm: PackedLM, weights: dict[str, Tensor], module: str) -> Tensor:
    return weights[module] if module in weights else weight_of(lm.model, module).detach().float().cpu()


class _Now(threading.local):
    """The pass that a thread is in, if there are adapters, and its rows that have one: lanes are in several at once."""

    layout: Layout | None = None
    rows: Sequence[tuple[PackedRow, RowAdapter, float]] = ()

    def enter(self, layout: Layout | None) -> None:
        if layout is not self.layout:
            self.layout = layout
            self.rows = _adapted(layout) if layout is not None else ()


def adapt_rows(lm: PackedLM) -> None:
    """Makes a base's layers heed `Layout.adapters`, for ever. Rows without an adapter are as before, to the bit."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    now = _Now()

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layout = kwargs.get("layout")
        now.enter(layout if layout is not None and layout.adapters is not None else None)

    for index, layer in enumerate(lm.layers):
        layer.register_forward_pre_hook(begin, with_kwargs=True)
        for part in layer.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_hook(_LinearHook(names[id(part)], now))
        layer.register_forward_hook(_layer_hook(index, now, is_last=index + 1 == lm.n_layers))


class _LinearHook(AdapterHook):
    def __init__(self, name: str, now: _Now) -> None:
        self.name, self._now = name, now

    def __call__(self, module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        touching = [(row, adapter) for row, adapter, _ in self._now.rows if adapter.touches(self.name)]
        if touching:
            self.adapt(touching, module, args[0], output)

    def adapt(
        self, rows: Sequence[tuple[PackedRow, RowAdapter]], module: nn.Linear, x: Tensor, y: Tensor
    ) -> None:
        # Small products for every row: what a mode has to look at takes longer than they do. On one thread:
        # more of them might round otherwise.
        with torch._C.DisableTorchFunction(), torch_threads(1):
            x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for row, adapter in rows:
                tokens = slice(row.start, row.start + row.length)
                adapter.linear(self.name, x[tokens], y[tokens], module.bias)


def _layer_hook(index: int, now: _Now, *, is_last: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        for row, adapter, scale in now.rows:
            if scale:
                adapter.intervene(index, output[0, row.start : row.start + row.length], row, scale)
        if is_last:
            now.enter(None)  # a thread that waits must not keep models that are put away

    return hook


def _adapted(layout: Layout) -> list[tuple[PackedRow, RowAdapter, float]]:
    scales = layout.scales or (layout.scale,) * len(layout.rows)
    rows = zip(layout.rows, layout.adapters or (), scales, strict=True)
    return [(row, adapter, scale) for row, adapter, scale in rows if adapter is not None]
