"""A model's passes in float32, without a float32 copy of the model.

A module's weights are converted when the module is called, and freed after it. Beside the model there are the float32
weights of one module at a time, of Llama-2-7B at most 180 MB, and the activations of the pass. The numbers are those of
the model loaded in float32: its modules are built anew from the configuration, because constants that a bfloat16 model
keeps rounded (Gemma's scale of embeddings) are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers.initialization import no_init_weights

from heft_engine.model.layout import Layout
from heft_engine.model.packed_lm import PackedLM


class Float32LM(PackedLM):
    """A PackedLM of float32 passes over the weights that another model has at the time of the pass.

    It has no interventions at first. Weights of several devices come to the model's first one. Two threads must not run
    passes at the same time.
    """

    def __init__(self, source: PackedLM) -> None:
        self._source = source
        super().__init__(_without_weights(source))
        self.on_forward = source.on_forward
        #: The model's own: whoever reads its weights converts them.
        self.head = source.head
        embedding = getattr(self.backbone, self.family.embedding)
        # The rows of a pass stand for the table, which may end before the padding token's row.
        embedding.padding_idx = None
        self._weights = {
            name: _Float32Weights(module, _base_layer(source.model.get_submodule(name)), source.device)
            for name, module in self.model.named_modules()
            if module._parameters and module is not embedding and name != _head_name(self.model)
        }

    @property
    def device(self) -> torch.device:
        return self._source.device

    def on_load(self, module: str, change: Callable[[], None]) -> None:
        """Calls `change` each time that a module's float32 weights have been loaded, before they are used."""
        self._weights[module].change = change

    def keep_during(self, module: str, caller: nn.Module) -> None:
        """Keeps a module's float32 weights while `caller` runs, which reads them itself."""
        self._weights[module].load_for(caller)

    def embed(self, ids: Tensor) -> Tensor:
        source = getattr(self._source.backbone, self.family.embedding)
        rows = source.weight.detach()[ids.flatten()].float()
        places = torch.arange(len(rows), device=rows.device).view(ids.shape)
        embedding = getattr(self.backbone, self.family.embedding)
        return cast(Tensor, functional_call(embedding, {"weight": rows}, (places,)))

    def run_layers(
        self,
        states: Tensor,
        positions: Tensor,
        layout: Layout,
        first: int,
        end: int,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        with full_precision():
            return super().run_layers(states, positions, layout, first, end, watch)

    def finish(self, states: Tensor) -> Tensor:
        return super().finish(states).to(self.head.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.exact_logits(hidden)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        with full_precision():
            return super().exact_logits(hidden)


class _Float32Weights:
    """One module's parameters in float32, while it or a caller that needs them runs; empty the rest of the time."""

    def __init__(self, module: nn.Module, source: nn.Module, device: torch.device) -> None:
        self.change: Callable[[], None] = lambda: None
        self._module, self._source, self._device = module, source, device
        self._empty = dict(module._parameters)
        self._users = 0
        self.load_for(module)

    def load_for(self, caller: nn.Module) -> None:
        """Loads the weights whenever `caller` runs."""
        caller.register_forward_pre_hook(self._load)
        caller.register_forward_hook(self._free, always_call=True)

    def _load(self, *_: Any) -> None:
        self._users += 1
        if self._users > 1:
            return
        for name in self._empty:
            weights = getattr(self._source, name)
            if weights is None:
                continue
            # A copy of float32 weights too: `change` writes into them.
            exact = weights.detach().to(self._device, torch.float32, copy=True)
            self._module._parameters[name] = nn.Parameter(exact, requires_grad=False)
        self.change()

    def _free(self, *_: Any) -> None:
        self._users -= 1
        if self._users == 0:
            self._module._parameters.update(self._empty)


def _without_weights(source: PackedLM) -> nn.Module:
    """Returns the model's modules in float32, their parameters without data and their buffers on its first device."""
    config = source.config
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: nn.Module = type(cast(Any, source.model))._from_config(
            config, dtype=torch.float32, attn_implementation=config._attn_implementation
        )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(source.device)
    return model.requires_grad_(False).eval()


def _base_layer(module: nn.Module) -> nn.Module:
    """Returns the layer that peft has put an adapter around, or the module itself."""
    layer = getattr(module, "base_layer", module)
    assert isinstance(layer, nn.Module)
    return layer


def _head_name(model: nn.Module) -> str:
    head = cast(Any, model).get_output_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is head)


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 matrix products are float32's: no TF32 on a GPU, no bfloat16 on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
