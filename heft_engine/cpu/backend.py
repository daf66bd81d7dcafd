"""The backend of models on a CPU: AMX products, attention and fused layers, and the compiled head, where there are any.

Every operator gives the same bits for any number of rows and threads. What it does not support runs as in TorchBackend.
`HEFT_KERNELS=off` turns all operators off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heft_engine.cpu import amx_attention, operators, packed_weights
from heft_engine.cpu.fused_layers import FusedLayers
from heft_engine.model.backend import DecoderLayers, TorchBackend
from heft_engine.model.layout import AttentionOptions, Layout
from heft_engine.runtime.parallel import all_threads


class CpuBackend(TorchBackend):
    """TorchBackend with the compiled operators of this machine (heft_engine.cpu.operators)."""

    def __init__(self, layers: DecoderLayers) -> None:
        super().__init__(layers)
        #: AMX products have the same bits in any batch for nothing.
        self.is_batch_invariant |= any(
            packed_weights.amx_for_weight(weight) is not None for weight in self._weights()
        )
        self._fused_layers: FusedLayers | None = None
        #: Held while fused layers are built: threads may need them side by side.
        self._building = threading.Lock()

    @property
    def fused_layers(self) -> FusedLayers:
        """The layers' fused passes, each type compared with its module's own `forward` once."""
        with self._building:
            if self._fused_layers is None:
                with super().inference_mode():
                    self._fused_layers = FusedLayers(self.layers, self)
            return self._fused_layers

    @contextmanager
    def inference_mode(self, *, one_token: bool = False) -> Iterator[None]:
        with self.fused_layers.active(), super().inference_mode(one_token=one_token):
            yield

    def pass_length(self, tokens: int) -> int:
        needs_no_blocks = all(packed_weights.amx_for_weight(weight) is not None for weight in self._weights())
        return tokens if needs_no_blocks else super().pass_length(tokens)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        amx = packed_weights.amx_for_weight(weight)
        if amx is None:
            return None
        with all_threads():
            return amx.linear(x, weight, packed_weights.packed_copy(weight), bias)

    def attention(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        options: AttentionOptions,
    ) -> Tensor | None:
        amx = amx_attention.amx_for(layout, query, key, value, options)
        if amx is None:
            return None
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        with all_threads():
            return amx_attention.attend(amx, layer, q, k, v, layout, options)[None]

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        fused_ops = operators.fused_ops()
        is_supported = weight.device.type == hidden.device.type == "cpu" and weight.is_contiguous()
        is_supported = is_supported and weight.dtype == hidden.dtype == torch.bfloat16
        if fused_ops is None or not is_supported or torch.is_grad_enabled():
            return None
        with all_threads():
            return fused_ops.logits(hidden, weight.detach())

    def pack_weights(self, spare_bytes: int) -> None:
        if packed_weights.bytes_to_pack(self.layers.modules) <= spare_bytes:
            packed_weights.pack(self.layers.modules)

    def unpack_weights(self) -> None:
        packed_weights.unpack(self.layers.modules)

    def packed_bytes(self, weight: Tensor) -> int:
        return packed_weights.packed_bytes(weight)

    def _weights(self) -> Iterator[Tensor]:
        """The weights of the first layer's linear layers: those of the others have the same shapes."""
        return (part.weight for part in self.layers.modules[0].modules() if isinstance(part, nn.Linear))
