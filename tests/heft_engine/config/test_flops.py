"""Floating-point operations of a stage, counted by hand."""

from __future__ import annotations

from heft_engine.config.flops import CacheLevel, RowTokens, Shape, StageWork, stage_flops

SHAPE = Shape(layers=4, layer=1_000, head=500, width=0)


def rows(*lengths: int) -> list[RowTokens]:
    return [RowTokens(total=length, suffix=2, supervised=1) for length in lengths]


def test_a_frozen_base_costs_four_operations_a_weight_and_token() -> None:
    work = StageWork(level=CacheLevel.NONE, first_layer=0, epochs=3)
    assert stage_flops(SHAPE, rows(10, 20), work) == 3 * (4 * 4 * 1_000 * 30 + 4 * 500 * 2)


def test_what_is_kept_is_counted_once() -> None:
    keys_values = StageWork(level=CacheLevel.KV, first_layer=3, epochs=5)
    once = 2 * 1_000 * (3 * 30 + 1 * 26)  # the lower layers, and the upper one left of the suffixes
    assert stage_flops(SHAPE, rows(10, 20), keys_values) == once + 5 * (4 * 1_000 * 4 + 4 * 500 * 2)
    states = StageWork(level=CacheLevel.HIDDEN_STATES, first_layer=3, epochs=5)
    assert stage_flops(SHAPE, rows(10, 20), states) == (
        2 * 1_000 * 3 * 30 + 5 * (2 * 1_000 * 26 + 4 * 1_000 * 4 + 4 * 500 * 2)
    )


def test_attention_grows_with_the_square() -> None:
    wide = Shape(layers=1, layer=0, head=0, width=8)
    work = StageWork(level=CacheLevel.NONE, first_layer=0, epochs=1)
    assert stage_flops(wide, rows(100), work) == (1 + 2) * 2 * 8 * 100**2
