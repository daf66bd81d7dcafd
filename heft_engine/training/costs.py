"""What a run leaves for comparisons: what each stage cost, and which rows came out right after it.

It does NOT compare: see heft_engine.studies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from heft_engine.adapters.adapter import Adapter, Boundary
from heft_engine.config.flops import CacheLevel, RowTokens, Shape, StageWork, stage_flops
from heft_engine.data.encoding import Example
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length
from heft_engine.training.cache_plan import CachePlan
from heft_engine.training.loop import Progress

if TYPE_CHECKING:
    from heft_engine.training.run import Run


def shape_of(lm: PackedLM) -> Shape:
    """The frozen weights that tokens are multiplied with."""
    weights = [p for layer in lm.layers for p in layer.parameters() if p.dim() > 1 and not p.requires_grad]
    heads = int(lm.config.num_attention_heads)
    return Shape(
        layers=lm.n_layers,
        layer=sum(p.numel() for p in weights) // lm.n_layers,
        head=int(lm.head.weight.numel()),
        width=heads * int(getattr(lm.config, "head_dim", None) or lm.hidden_size // heads),
    )


def cost_of(run: Run, index: int, trainable: Adapter, progress: Progress, seconds: float) -> dict[str, Any]:
    """A stage that has been trained, before it is merged: its arithmetic is that of the tokens it went through.

    `flops_once` of `flops` are the same however many epochs there are.
    """
    stage, boundary = run.config.stages[index], trainable.boundary()
    trained = sum(parameter.numel() for parameter in trainable.parameters().values())
    rows, shape = [_tokens(example, boundary) for example in run.examples], shape_of(run.lm)
    work = StageWork(
        level=CachePlan.from_json(progress.cache).level if progress.cache else CacheLevel.NONE,
        first_layer=boundary.layer,
        epochs=progress.tokens / sum(row.total for row in rows),
        adapter=0 if boundary.positions else trained,
        checkpointing=progress.checkpointing,
    )
    return {
        "stage": stage.type,
        "stage_index": index,
        "trained_parameters": trained,
        "tokens": progress.tokens,
        "seconds": round(seconds, 3),
        "epochs": work.epochs,
        "flops": stage_flops(shape, rows, work),
        "flops_once": stage_flops(shape, rows, replace(work, epochs=0)),
    }


def outcomes(run: Run, validation: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Row by row how right answers were after each stage; None without rows to evaluate on, or in part unknown.

    `validation`: what the result came to on rows that are not reported.
    """
    found = [record for record in run.state.evaluations if "right" in record or "values" in record]
    if not found or len(found) < len(run.state.evaluations):
        return None
    kept = ("stage", "stage_index", "right", "values")
    return {
        "n": found[0]["n"],
        "metric": found[0]["metric"],
        "split": run.split,
        "rows_sha256": answers_hash(run.reported),
        "results": [{name: record[name] for name in kept if name in record} for record in found],
        "validation": validation,
    }


def answers_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the possible answers and the right one, in order: alike for the same rows, however they are cut."""
    total = hashlib.sha256()
    for example in examples:
        total.update(repr((example.labels, example.gold)).encode())
    return total.hexdigest()


def _tokens(example: Example, boundary: Boundary) -> RowTokens:
    total = packed_length(example)
    skipped = boundary.first_token(len(example.prompt))
    return RowTokens(total=total, suffix=total - skipped, supervised=example.supervised_tokens)
