"""A bundle's model in memory: its base model, the LoRA stages merged into it, the interventions on their layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from heft_engine.bundle.format import Bundle, StoredIntervention
from heft_engine.errors import BundleError
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import BaseModel, load_model, resolve
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.model_files import weights_hash
from heft_engine.model.nf4 import store_dense
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import choose_device, dtype_of


def assemble(
    bundle: Bundle,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    base: BaseModel | None = None,
) -> PackedLM:
    """Loads a bundle's base model and applies the bundle to it.

    `dtype` is by default the one that the model was trained in. A base in 4 bits is quantised in that one in any case,
    since another has other codes, and is then stored whole in `dtype`. `base` saves a second look-up of the base model.
    Raises BundleError when the bundle is for another model, ModelError when its base model can't be loaded.
    """
    if base is None:
        base = resolve_base(bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    trained_dtype, quantization = dtype_of(bundle.info.dtype), bundle.info.base_quantization
    dtype = dtype or trained_dtype
    model: Any = load_model(
        base,
        dtype=trained_dtype if quantization else dtype,
        device=device or choose_device(),
        attention=IMPLEMENTATION,
        quantization=quantization,
    )
    if quantization and dtype != trained_dtype:
        store_dense(model)
        model.to(dtype)
    lm = PackedLM(model)
    apply_bundle(lm, bundle)
    return lm


def apply_bundle(lm: PackedLM, bundle: Bundle) -> None:
    """Merges a bundle's adapters into its base model and places its interventions. Raises BundleError."""
    for adapter in bundle.adapters:
        adapter.merge_into(lm.model)
    lm.interventions.extend(restore_interventions(bundle.interventions, lm))


def restore_interventions(stored: Iterable[StoredIntervention], lm: PackedLM) -> list[PlacedIntervention]:
    """Returns a bundle's interventions for the layers of `lm`. Raises BundleError when they are for another model."""
    restored = []
    for entry in stored:
        if not 0 <= entry.layer < lm.n_layers:
            raise BundleError(
                f"the bundle has an intervention at layer {entry.layer}, and the base model has {lm.n_layers} layers"
            )
        restored.append(entry.restore(lm.hidden_size))
    return restored


def resolve_base(
    bundle: Bundle, *, model_dir: Path | None, cache_dir: Path | None, allow_paths: bool
) -> BaseModel:
    """Finds the base model that a bundle was trained on, by its recorded revision.

    Raises BundleError when its weights are others than those recorded, ModelError when it can't be found.
    """
    record = bundle.info.base_model
    reference = record.reference
    if record.source == "hub" and record.revision:
        reference = f"{reference.partition('@')[0]}@{record.revision}"  # the commit, where a branch was named
    base = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    if weights_hash(base.path) != record.weights_sha256:
        raise BundleError(f"{record.reference} is not the base this model was trained on: its weights differ")
    return base
