"""Exports of a bundle: a plain Hugging Face directory, a PEFT adapter or pyreft's intervention directory.

merged   the base model with the adapters merged, config and tokenizer. ReFT can't be merged into weights (it edits
         some tokens of one layer's output), so the interventions lie beside them in `reft/`, as in the bundle.
peft     one adapter for the original base model; several LoRA stages become one of their summed rank.
pyreft   what `pyreft.ReftModel.load` reads, for the base model with the adapters merged (export `merged`).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from heft_engine.adapters.lora.concat import concatenate, needs_base
from heft_engine.adapters.lora.weights import weight_of
from heft_engine.bundle.assemble import assemble
from heft_engine.bundle.format import Bundle, read_bundle
from heft_engine.bundle.probe import check_probe
from heft_engine.bundle.pyreft_format import write_pyreft
from heft_engine.data.chat_template import ChatTemplate
from heft_engine.errors import ConfigError
from heft_engine.inference.greedy import eos_token_ids
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.model import smollm2
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.nf4 import store_dense

Format = Literal["merged", "peft", "pyreft"]


def export(
    bundle_dir: Path,
    format: Format,
    out_dir: Path,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
) -> None:
    """Writes a bundle as `format` into a new or empty directory.

    Raises ConfigError when the bundle has no stage of that kind, or when `out_dir` is not empty.
    """
    bundle = read_bundle(bundle_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty", param="out")
    if format == "peft" and not bundle.adapters:
        raise ConfigError("this model has no LoRA stage, so there is no adapter to export", param="format")
    if format == "pyreft" and not bundle.interventions:
        raise ConfigError(
            "this model has no ReFT stage, so there is no intervention to export", param="format"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    if format == "merged":
        _merged(bundle, out_dir, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    elif format == "peft":
        _peft(bundle, out_dir, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    else:
        write_pyreft(bundle, out_dir)


def _peft(bundle: Bundle, out_dir: Path, **source: Any) -> None:
    if not needs_base(bundle.adapters):
        concatenate(bundle.adapters).save(out_dir, _loadable_reference(bundle))
        return
    base = assemble(replace(bundle, adapters=[], interventions=[]), device="cpu", **source).model
    adapter = concatenate(bundle.adapters, lambda module: weight_of(base, module))
    adapter.save(out_dir, _loadable_reference(bundle))


def _loadable_reference(bundle: Bundle) -> str:
    """Returns the base's name or path for peft and transformers, which don't know this engine's alias."""
    reference = bundle.info.base_model.reference
    return smollm2.HUB_ID if reference == smollm2.ALIAS else reference


def _merged(bundle: Bundle, out_dir: Path, **source: Any) -> None:
    lm = assemble(bundle, device="cpu", **source)
    check_probe(bundle, ModelVariant.of_merged(lm))
    model: Any = lm.model
    lm.interventions.clear()
    store_dense(model)
    # transformers does not know this engine's attention.
    model.config._attn_implementation = "sdpa"
    # Nor does it know that an answer ends as the chat template ends turns, which may differ from EOS.
    ends = eos_token_ids(lm, ChatTemplate(load_tokenizer(bundle.path / "tokenizer")))
    if len(ends) > 1:
        model.generation_config.eos_token_id = sorted(ends)
    model.save_pretrained(out_dir, safe_serialization=True)
    shutil.copytree(bundle.path / "tokenizer", out_dir, dirs_exist_ok=True)
    for directory in bundle.path.glob("reft*"):
        shutil.copytree(directory, out_dir / directory.name)
