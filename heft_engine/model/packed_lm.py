"""A base model as this engine runs it: packed batches in, hidden states and label scores out.

The decoder layers are called one by one instead of through the family's `forward`, so that training, scoring and
caching can each start and stop at a layer. Tests hold every family to its own `forward`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heft_engine.model.backend import DecoderLayers, backend_for
from heft_engine.model.families import family_of
from heft_engine.model.interventions import Interventions
from heft_engine.model.layout import Layout
from heft_engine.model.nf4 import quantized_sizes
from heft_engine.model.packing import Batch
from heft_engine.runtime.devices import free_bytes
from heft_engine.runtime.threads import torch_threads

#: On a CPU every shape of a matrix product has machine code of its own, 0.9 MB of it, of which oneDNN keeps the last
#: 1,024 otherwise: as much memory as a pass takes, for shapes that mostly don't come again. It reads this at its first
#: product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


#: Held while a head is there in float32: threads ask for it side by side, and it may be two gigabytes.
_EXACT = threading.Lock()


class PackedLM:
    """A causal language model with its interventions, over packed batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config
        self.family = family_of(self.config)
        self.backbone: Any = getattr(model, self.family.backbone)
        self.layers: nn.ModuleList = self.backbone.layers
        self.head: Any = cast(Any, model).get_output_embeddings()
        self.interventions = Interventions(self.layers)
        #: Called with every pass through layers: long evaluations and prefills show in it that they move.
        self.on_forward: Callable[[], None] = lambda: None
        #: Whether layers keep their input alone and run again for their gradient.
        self.checkpointing = False
        types = [self._kind(index) or "" for index in range(self.n_layers)]
        self.backend = backend_for(
            DecoderLayers(modules=self.layers, types=types, rotary=self._turned, device=self.device)
        )

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Width of the logits: at least the tokenizer's vocabulary, and some more where it is padded."""
        return int(self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """The device of token ids: the embedding's device, which a model spread over several GPUs has first."""
        return cast(torch.device, getattr(self.backbone, self.family.embedding).weight.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(self.backbone, self.family.embedding).weight.dtype)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Number of key/value heads, and their dimension."""
        heads = int(self.config.num_attention_heads)
        if not self.family.grouped_heads:
            return heads, self.hidden_size // heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        return int(self.config.num_key_value_heads or heads), int(head_dim)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) + sum(quantized_sizes(self.model))

    def inference_mode(self, *, one_token: bool = False) -> AbstractContextManager[None]:
        """For passes without a gradient. A row's numbers agree to rounding in any batch; to the bit where the backend
        is batch-invariant (heft_engine.model.batch_invariant).

        `one_token`: for passes of one token a sequence, and for the head.
        """
        return self.backend.inference_mode(one_token=one_token)

    def pack(self, spare_bytes: int | None = None) -> None:
        """Packs the layers' weights if that takes no more than so many bytes: by default than half of what is free."""
        self.backend.pack_weights(free_bytes(self.device) // 2 if spare_bytes is None else spare_bytes)

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Weights are packed inside, where there is room for that."""
        try:
            self.pack()
            yield
        finally:
            self.backend.unpack_weights()

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states, after the final norm: (T, hidden)."""
        ids, positions = batch.inputs(self.device)
        return self.finish(self.run_layers(self.embed(ids), positions, batch.layout, 0, self.n_layers))[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) → embeddings (B, T, hidden), scaled as the family does it."""
        return cast(Tensor, getattr(self.backbone, self.family.embedding)(ids))

    def run_layers(
        self,
        states: Tensor,
        positions: Tensor,
        layout: Layout,
        first: int,
        end: int,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Runs decoder layers first … end − 1 over states (B, T, hidden) at `positions` (B, T).

        `watch` is told each layer and the states before it.
        """
        self.on_forward()
        rotary: dict[str | None, Any] = {}
        for index in range(first, end):
            if watch is not None:
                watch(index, states)
            kind = self._kind(index) if self.family.rotary_by_layer_type else None
            if kind not in rotary:
                rotary[kind] = self._turned(states, positions, kind)
            options: dict[str, Any] = {
                "attention_mask": None,
                "position_ids": positions,
                "position_embeddings": rotary[kind],
                "use_cache": False,
                "layout": layout,
            }
            if not torch.is_grad_enabled():
                options["backend"] = self.backend
            states = self._run_layer(index, states, options)
        return states

    def _kind(self, index: int) -> str | None:
        """The type of a layer: families with several types name them in their configuration."""
        kinds = getattr(self.config, "layer_types", None)
        return None if kinds is None else str(kinds[index])

    def _turned(self, states: Tensor, positions: Tensor, kind: str | None) -> Any:
        """Cosine and sine of the rotary embedding, of states' dtype."""
        by_kind = (kind,) if self.family.rotary_by_layer_type else ()
        return self.backbone.rotary_emb(states, positions.to(states.device), *by_kind)

    def _run_layer(self, index: int, states: Tensor, options: dict[str, Any]) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self.layers[index], states, use_reentrant=False, **options))
        return cast(Tensor, self.layers[index](states, **options))

    def finish(self, states: Tensor) -> Tensor:
        """The final norm."""
        return cast(Tensor, getattr(self.backbone, self.family.norm)(states))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, hidden) → float32 logits (n, vocabulary), soft-capped where the family does so."""
        return self._cap(cast(Tensor, self.head(hidden)).float())

    def logits_of(self, hidden: Tensor, tokens: slice) -> Tensor:
        """Float32 logits of a slice of the vocabulary, (n, tokens); hidden (n, hidden) is multiplied in its dtype."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        part = None if bias is None else bias[tokens].to(hidden.dtype)
        return self._cap(F.linear(hidden.to(weight.device), weight[tokens].to(hidden.dtype), part).float())

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """The logits, multiplied in float32: through a bfloat16 head, 7 of 160 BoolQ rows tied exactly."""
        weight = self.head.weight
        hidden = hidden.to(weight.device)  # of a model on several GPUs
        logits = self.backend.logits(hidden, weight)
        if logits is not None:
            return self._cap(logits + self._bias())
        # One copy of the head at a time. More threads might round otherwise.
        with _EXACT, torch_threads(1) if self.backend.is_batch_invariant else nullcontext():
            return self._cap(hidden.float() @ weight.float().T + self._bias())

    def label_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Float32 logits of a few tokens: hidden (n, hidden), tokens (n, k) → (n, k).

        Products and sums row by row, never one matrix product: a row's bits don't depend on n.
        """
        device = self.head.weight.device
        hidden, tokens = hidden.to(device), tokens.to(device)  # of a model on several GPUs
        weights = self.head.weight[tokens].float()
        bias = self._bias()
        offset = bias[tokens] if isinstance(bias, Tensor) else bias
        return self._cap((weights * hidden.float()[:, None, :]).sum(-1) + offset)

    def _bias(self) -> Tensor | float:
        return self.head.bias.float() if getattr(self.head, "bias", None) is not None else 0.0

    def _cap(self, logits: Tensor) -> Tensor:
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
