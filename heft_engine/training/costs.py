"""The arithmetic and the time that each stage cost, for comparisons (heft_engine.studies)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from heft_engine.adapters.adapter import Boundary
from heft_engine.config.flops import CacheLevel, RowTokens, Shape, StageWork, stage_flops
from heft_engine.data.encoding import Example
from heft_engine.model.nf4 import quantized_sizes
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length
from heft_engine.training.memory.cache_plan import CachePlan
from heft_engine.training.progress import Progress
from heft_engine.training.stage_inputs import StageInputs


def shape_of(lm: PackedLM) -> Shape:
    """Returns the sizes of the frozen weights that tokens are multiplied with."""
    weights = [p for layer in lm.layers for p in layer.parameters() if p.dim() > 1 and not p.requires_grad]
    in_layers = sum(p.numel() for p in weights) + sum(quantized_sizes(lm.layers))
    heads = int(lm.config.num_attention_heads)
    return Shape(
        layers=lm.n_layers,
        layer=in_layers // lm.n_layers,
        head=int(lm.head.weight.numel()),
        width=heads * int(getattr(lm.config, "head_dim", None) or lm.hidden_size // heads),
    )


def stage_cost(inputs: StageInputs, progress: Progress, seconds: float) -> dict[str, Any]:
    """Returns the cost of a stage that has been trained and not yet merged, as JSON.

    Operations are counted from the tokens that the stage went through. `flops_once` of `flops` do not depend on the
    number of epochs.
    """
    boundary, trained = inputs.adapter.boundary(), inputs.trained_parameters()
    rows, shape = [_row_tokens(example, boundary) for example in inputs.examples], shape_of(inputs.lm)
    work = StageWork(
        level=CachePlan.from_json(progress.cache).level if progress.cache else CacheLevel.NONE,
        first_layer=boundary.layer,
        epochs=progress.tokens / sum(row.total for row in rows),
        adapter=0 if boundary.positions else trained,
        checkpointing=progress.checkpointing,
    )
    return {
        "stage": inputs.stage.type,
        "stage_index": inputs.index,
        "trained_parameters": trained,
        "tokens": progress.tokens,
        "seconds": round(seconds, 3),
        "epochs": work.epochs,
        "flops": stage_flops(shape, rows, work),
        "flops_once": stage_flops(shape, rows, replace(work, epochs=0)),
    }


def _row_tokens(example: Example, boundary: Boundary) -> RowTokens:
    total = packed_length(example)
    cached = boundary.first_token(len(example.prompt))
    return RowTokens(total=total, suffix=total - cached, supervised=example.supervised_tokens)
