"""A base model in memory and the models on it: adapters that share its passes, merged copies that share its weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from heft_engine.adapters.lora.weights import linear_of
from heft_engine.bundle.assemble import apply_bundle, assemble
from heft_engine.bundle.format import Bundle, check_tokenizer
from heft_engine.bundle.probe import check_probe
from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import BaseQuantization
from heft_engine.data.encoding import tokenizer_hash
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.predictor import Predictor
from heft_engine.serving.row_adapters import UnmergedModel, enable_row_adapters
from heft_engine.serving.shared_copy import copy_sharing_weights, unique_bytes
from heft_engine.serving.text_generator import TextGenerator

#: merged: with layers of its own, the fastest. shared: an unmerged adapter on the base model. base: the base model.
Kind = Literal["merged", "shared", "base"]


@dataclass(frozen=True)
class BaseKey:
    """Identifies a base model in memory: models with equal keys share it."""

    reference: str
    revision: str | None
    path: Path
    dtype: torch.dtype
    quantization: BaseQuantization | None = None

    @classmethod
    def of(
        cls, model: BaseModel, dtype: torch.dtype, quantization: BaseQuantization | None = None
    ) -> BaseKey:
        return cls(model.reference, model.revision, model.path, dtype, quantization)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to answer. `weight_bytes`: of the weights that its base model does not have."""

    predictor: Predictor
    kind: Kind
    base: BaseKey
    weight_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes beyond the base model's: weights, and the key/value cache of a merged model."""
        kv_cache_bytes = self.predictor.generator.memory_bytes if self.kind == "merged" else 0
        return self.weight_bytes + kv_cache_bytes


class LoadedBase:
    """One base model in memory. Its passes run on the batcher's thread; models are loaded on any.

    `spare_bytes` returns the bytes that packed copies of weights may take.
    """

    def __init__(
        self,
        model: BaseModel,
        key: BaseKey,
        *,
        device: str,
        batcher: Batcher,
        key_value_bytes: int,
        spare_bytes: Callable[[], int],
    ) -> None:
        self.model = model
        self.key = key
        base = load_model(
            model,
            dtype=key.dtype,
            device=device,
            attention=IMPLEMENTATION,
            quantization=key.quantization,
        )
        self.lm = PackedLM(base)
        self._has_row_adapters = False
        self._spare_bytes = spare_bytes
        self.lm.pack(spare_bytes() - unique_bytes(self.lm))
        self.weight_bytes = unique_bytes(self.lm)
        self._device = device
        self._batcher = batcher
        self._key_value_bytes = key_value_bytes
        self._lock = threading.Lock()
        # By the tokenizer's hash: a thousand models of one base model share its tokenizer and generate in one batch.
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._generators: dict[str, TextGenerator] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of its weights and of the key/value caches that its models share."""
        with self._lock:
            generators = list(self._generators.values())
        return self.weight_bytes + sum(generator.memory_bytes for generator in generators)

    def load_plain(self, task: TaskType, scope: Hashable) -> LoadedModel:
        """Returns the base model as it is, with a task's default template."""
        tokenizer = load_tokenizer(self.model.path)
        shared = self._shared_parts(tokenizer_hash(tokenizer), tokenizer)
        variant = ModelVariant(lm=self.lm, scope=scope)
        predictor = Predictor.of_base(self.model, task, variant, tokenizer, **shared)
        return LoadedModel(predictor=predictor, kind="base", base=self.key)

    def load_shared(self, bundle: Bundle, scope: Hashable) -> LoadedModel:
        """Loads a bundle as an unmerged adapter.

        Raises BundleError, also when the probe rows' scores, unmerged, are not within the bundle's tolerance.
        """
        adapter = UnmergedModel(self.lm, bundle.adapters, bundle.interventions)
        variant = ModelVariant(
            lm=self.lm, adapter=adapter, interventions=tuple(adapter.interventions), scope=scope
        )
        self._batcher.run(lambda: self._check_shared(bundle, variant))
        tokenizer = self._tokenizer(bundle)
        shared = self._shared_parts(bundle.info.tokenizer_sha256, tokenizer)
        predictor = Predictor.of_bundle(bundle, variant, tokenizer, **shared)
        return LoadedModel(
            predictor=predictor, kind="shared", base=self.key, weight_bytes=adapter.memory_bytes
        )

    def _check_shared(self, bundle: Bundle, variant: ModelVariant) -> None:
        # The hooks cost every pass a little, so the first shared model brings them.
        if not self._has_row_adapters:
            enable_row_adapters(self.lm)
            self._has_row_adapters = True
        check_probe(bundle, variant)

    def load_merged(self, bundle: Bundle, scope: Hashable) -> LoadedModel:
        """Loads a bundle merged into copies of the weights that its adapters change. Raises BundleError."""
        lm = self._merge(bundle)
        lm.pack(self._spare_bytes())
        # Shared weights may have been packed, too.
        self.weight_bytes = unique_bytes(self.lm)
        variant = ModelVariant.of_merged(lm, scope)
        self._batcher.run(lambda: check_probe(bundle, variant))
        tokenizer = self._tokenizer(bundle)
        predictor = Predictor.of_bundle(
            bundle, variant, tokenizer, batcher=self._batcher, key_value_bytes=self._key_value_bytes
        )
        weight_bytes = unique_bytes(lm, beside=self.lm)
        for placed in lm.interventions:
            weight_bytes += sum(p.numel() * p.element_size() for p in placed.intervention.parameters())
        return LoadedModel(predictor=predictor, kind="merged", base=self.key, weight_bytes=weight_bytes)

    def _merge(self, bundle: Bundle) -> PackedLM:
        changed = {module for adapter in bundle.adapters for module in adapter.factors}
        for module in changed:
            linear_of(self.lm.model, module)  # raises BundleError when there is none
        if self._device == "auto":
            # Layers on several devices are bound to their modules and can't be copied.
            return assemble(bundle, base=self.model, device=self._device, dtype=self.lm.dtype)
        lm = PackedLM(copy_sharing_weights(self.lm.model, changed))
        apply_bundle(lm, bundle)
        return lm

    def _tokenizer(self, bundle: Bundle) -> PreTrainedTokenizerBase:
        with self._lock:
            tokenizer = self._tokenizers.get(bundle.info.tokenizer_sha256)
        if tokenizer is not None:
            return tokenizer
        tokenizer = load_tokenizer(bundle.path / "tokenizer")
        check_tokenizer(bundle.info, tokenizer)
        with self._lock:
            return self._tokenizers.setdefault(bundle.info.tokenizer_sha256, tokenizer)

    def _shared_parts(self, sha256: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Returns a predictor's arguments for what models with one tokenizer share."""
        with self._lock:
            if sha256 not in self._generators:
                budget = self._key_value_bytes
                self._generators[sha256] = TextGenerator(self.lm, tokenizer, budget_bytes=budget)
            return {"batcher": self._batcher, "generator": self._generators[sha256]}


#: Of files with 16 bits a weight: 4.5 bits in the layers, and head and embeddings, which are whole, some 5 %.
_NF4_SHARE = 0.33


def expected_bytes(path: Path, quantization: BaseQuantization | None) -> int:
    """Returns about what a model will take in memory, from the size of its weight files."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return int(size * _NF4_SHARE) if quantization else size
