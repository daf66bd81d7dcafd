"""The backend of a model: how its passes without a gradient run on its device.

TorchBackend is torch's own and what every GPU runs. The package heft_engine.cpu has one with compiled operators. It is
optional: nothing imports it but `backend_for`, by its name, and where it is missing torch's own runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from heft_engine.model.batch_invariant import BLOCK_ROWS, STEP_ROWS, BatchInvariantMode
from heft_engine.model.layout import AttentionOptions, Layout
from heft_engine.model.nf4 import is_quantized
from heft_engine.runtime.devices import batch_invariance_requested
from heft_engine.runtime.parallel import one_thread

_CPU_BACKEND = "heft_engine.cpu.backend"


@dataclass(frozen=True, kw_only=True)
class DecoderLayers:
    """A model's decoder layers, and what a pass through them needs.

    types: of each layer; layers of one type differ in their weights alone. `rotary(states, positions, type)` returns
    cosine and sine of the rotary embedding.
    """

    modules: Sequence[nn.Module]
    types: Sequence[str]
    rotary: Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]
    device: torch.device


class TorchBackend:
    """torch's own operations.

    is_batch_invariant: passes without a gradient give a row the same bits in any batch and with any number of threads
    (heft_engine.model.batch_invariant): on a CPU, on request.
    """

    def __init__(self, layers: DecoderLayers) -> None:
        self.layers = layers
        self.is_batch_invariant = layers.device.type == "cpu" and batch_invariance_requested()

    @contextmanager
    def inference_mode(self, *, one_token: bool = False) -> Iterator[None]:
        """For passes without a gradient; `one_token`: for passes of one token a sequence, and for the head."""
        if not self.is_batch_invariant:
            yield
            return
        with one_thread(), BatchInvariantMode(STEP_ROWS if one_token else BLOCK_ROWS, self.linear):
            yield

    def pass_length(self, tokens: int) -> int:
        """Returns the tokens of a pass, filled up to whole blocks where products are cut into blocks."""
        return -(-tokens // BLOCK_ROWS) * BLOCK_ROWS if self.is_batch_invariant else tokens

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """F.linear, for any number of rows with the same bits; None if there is no such operator for the weight."""
        return None

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        options: AttentionOptions,
    ) -> Tensor | None:
        """Attention as `attend_rows` of heft_engine.model.attention; None if there is no operator for these rows."""
        return None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        """hidden (n, width) · weight (vocabulary, width)ᵀ in float32; None if there is no operator for it."""
        return None

    def pack_weights(self, spare_bytes: int) -> None:
        """Keeps copies of the layers' weights in the operators' own order, if they fit in so many bytes."""

    def unpack_weights(self) -> None:
        """Frees the packed copies."""

    def packed_bytes(self, weight: Tensor) -> int:
        """Returns the bytes of a weight's packed copy."""
        return 0


def backend_for(layers: DecoderLayers) -> TorchBackend:
    """Returns the backend for a model's device: that of heft_engine.cpu on a CPU, if it is installed.

    A quantised model runs on torch's own: compiled operators read weights as they are stored.
    """
    if layers.device.type == "cpu" and not any(map(is_quantized, layers.modules)):
        try:
            cpu = importlib.import_module(_CPU_BACKEND)
        except ModuleNotFoundError as error:
            if error.name not in (_CPU_BACKEND, _CPU_BACKEND.rpartition(".")[0]):
                raise
        else:
            return cast(TorchBackend, cpu.CpuBackend(layers))
    return TorchBackend(layers)
