"""A base in memory, once, and what stands on it: unmerged models that share its passes, merged ones that share its
untouched weights. It does NOT know who is held, for how long, or why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from heft_engine.adapters.lora.weights import weight_of
from heft_engine.bundle.format import Bundle, check_tokenizer
from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, tokenizer_hash
from heft_engine.data.task import Task
from heft_engine.errors import BundleError
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer
from heft_engine.model.model_files import inspect
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.predictor import Predictor, assemble, check_probe
from heft_engine.serving.row_adapters import UnmergedModel, adapt_rows
from heft_engine.serving.shared_copy import copy_sharing, unique_bytes
from heft_engine.serving.text_generator import TextGenerator

#: merged: its own layers, the fastest for one model. shared: what it adds to the base, row by row. base: nothing.
Kind = Literal["merged", "shared", "base"]


class Base:
    """One base model, loaded. Passes run on the batcher's thread; loading may run on any.

    `spare_bytes` says what weights may take to be packed.
    """

    def __init__(
        self,
        model: BaseModel,
        *,
        dtype: torch.dtype,
        device: str,
        batcher: Batcher,
        key_value_bytes: int,
        spare_bytes: Callable[[], int],
    ) -> None:
        self.model = model
        self.lm = PackedLM(load_model(model, dtype=dtype, device=device, attention=IMPLEMENTATION))
        adapt_rows(self.lm)
        self._spare_bytes = spare_bytes
        self.lm.pack(spare_bytes() - unique_bytes(self.lm.model))
        self.memory_bytes = unique_bytes(self.lm.model)
        self._device = device
        self._batcher = batcher
        self._key_value_bytes = key_value_bytes
        self._lock = threading.Lock()
        # A thousand models of one base have one tokenizer, and write their texts in one batch.
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._writers: dict[str, TextGenerator] = {}

    @property
    def written_bytes(self) -> int:
        """What texts that are being written hold."""
        return sum(generator.memory_bytes for generator in self._writers.values())

    def plain(self, task: TaskType, scope: Hashable) -> Predictor:
        """The base as it is, asked with a task's default template."""
        length = resolve_max_length(None, inspect(self.model.path).max_position_embeddings)
        tokenizer = load_tokenizer(self.model.path)
        encoder = Encoder(tokenizer, Task.resolve(TaskSettings(), task), length)
        return Predictor(
            ModelVariant(lm=self.lm, scope=scope),
            encoder,
            max_new_tokens=64,
            batcher=self._batcher,
            generator=self._writer(tokenizer_hash(tokenizer), tokenizer),
        )

    def shared(self, bundle: Bundle, scope: Hashable) -> tuple[Predictor, int]:
        """A model as what it adds to this base, and the bytes that this takes.

        Raises BundleError, also where its probe rows, computed unmerged, don't lie within the bundle's tolerance.
        """
        adapter = UnmergedModel(self.lm, bundle.adapters, bundle.interventions)
        variant = ModelVariant(
            lm=self.lm, adapter=adapter, interventions=tuple(adapter.interventions), scope=scope
        )
        self._batcher.run(lambda: check_probe(bundle, variant))
        tokenizer = self._tokenizer(bundle)
        generator = self._writer(bundle.info.tokenizer_sha256, tokenizer)
        return self._predictor(bundle, variant, tokenizer, generator), adapter.memory_bytes

    def merged(self, bundle: Bundle, scope: Hashable) -> tuple[Predictor, int]:
        """A model with its adapters merged, and the bytes that it holds beside the base. Raises BundleError."""
        lm = self._merged(bundle)
        lm.pack(self._spare_bytes())
        # It may have packed weights that it shares with the base, too.
        self.memory_bytes = unique_bytes(self.lm.model)
        variant = ModelVariant(lm=lm, interventions=tuple(lm.interventions), scope=scope)
        self._batcher.run(lambda: check_probe(bundle, variant))
        tokenizer = self._tokenizer(bundle)
        own = unique_bytes(lm.model, beside=self.lm.model)
        own += sum(
            p.numel() * p.element_size() for s in lm.interventions for p in s.intervention.parameters()
        )
        generator = TextGenerator(lm, tokenizer, budget_bytes=self._key_value_bytes)
        return self._predictor(bundle, variant, tokenizer, generator), own

    def _merged(self, bundle: Bundle) -> PackedLM:
        touched = {module for adapter in bundle.adapters for module in adapter.factors}
        for module in touched:
            weight_of(self.lm.model, module)
        if self._device == "auto":
            # Layers on several devices are bound to their modules.
            return assemble(bundle, base=self.model, device=self._device, dtype=self.lm.dtype)
        lm = PackedLM(copy_sharing(self.lm.model, touched))
        for adapter in bundle.adapters:
            adapter.merge_into(lm.model)
        for stored in bundle.interventions:
            if not 0 <= stored.layer < lm.n_layers:
                raise BundleError(f"the bundle's intervention at layer {stored.layer} is for a deeper model")
            lm.interventions.add(stored.restore(lm.hidden_size))
        return lm

    def _predictor(
        self,
        bundle: Bundle,
        variant: ModelVariant,
        tokenizer: PreTrainedTokenizerBase,
        generator: TextGenerator,
    ) -> Predictor:
        encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
        return Predictor(
            variant,
            encoder,
            bundle.info.max_new_tokens,
            temperature=bundle.info.temperature,
            batcher=self._batcher,
            generator=generator,
        )

    def _tokenizer(self, bundle: Bundle) -> PreTrainedTokenizerBase:
        with self._lock:
            known = self._tokenizers.get(bundle.info.tokenizer_sha256)
        if known is not None:
            return known
        tokenizer = load_tokenizer(bundle.path / "tokenizer")
        check_tokenizer(bundle.info, tokenizer)
        with self._lock:
            return self._tokenizers.setdefault(bundle.info.tokenizer_sha256, tokenizer)

    def _writer(self, sha256: str, tokenizer: PreTrainedTokenizerBase) -> TextGenerator:
        with self._lock:
            if sha256 not in self._writers:
                self._writers[sha256] = TextGenerator(self.lm, tokenizer, budget_bytes=self._key_value_bytes)
            return self._writers[sha256]


def size_on_disk(path: Path) -> int:
    """Bytes of a model's weight files: about what it will hold."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def key_of(model: BaseModel, dtype: torch.dtype) -> Hashable:
    """Which models stand on the same base."""
    return (model.reference, model.revision, str(model.path), dtype)
