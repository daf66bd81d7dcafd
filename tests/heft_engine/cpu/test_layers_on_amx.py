"""Whole models on AMX, with heads as wide as real ones, so that attention runs there too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from many_models import StoredWeights, examples, merged, models, stored_intervention, unmerged
from probe_models import packed
from tiny_models import FAMILIES, save_tiny_model

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps
from heft_engine.cpu.backend import CpuBackend
from heft_engine.cpu.packed_weights import bytes_to_pack
from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import PrefixCache, prefix_hashes
from heft_engine.inference.scoring import Scores, ScoringRow, score, score_rows
from heft_engine.serving.row_adapters import enable_row_adapters

pytestmark = pytest.mark.usefixtures("with_amx")

BF16 = torch.bfloat16
WIDE = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "head_dim": 32}
ONE_HEAD = {"num_key_value_heads": 1}
#: The families whose layers have quick passes.
QUICK = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def make_wide_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("wide-models")

    @cache
    def make(family: str) -> Path:
        sizes = dict(WIDE) if family != "gpt_neox" else {k: v for k, v in WIDE.items() if k != "head_dim"}
        return save_tiny_model(root / family, family, **sizes, **(ONE_HEAD if family != "gpt_neox" else {}))

    return make


def rows(count: int = 12) -> list[Example]:
    """Examples, a third of which have answers of several tokens, so that branches follow their prompts."""
    plain = examples(count, longest=90)
    several = ((7, 9, 11), (8,), (12, 5))
    return [
        Example(prompt=example.prompt, answers=several, labels=("a", "b", "c"), gold=0)
        if index % 3 == 0
        else example
        for index, example in enumerate(plain)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_torchs_to_rounding(
    family: str, make_wide_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_amx = score(packed(make_wide_model(family), BF16), rows())
    attended = []
    attend = AmxOps.attention

    def watched(*args: object) -> torch.Tensor:
        attended.append(True)
        return attend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(AmxOps, "attention", watched)
    assert score(packed(make_wide_model(family), BF16), rows()) == by_amx
    assert bool(attended) == (family != "gemma2"), "soft caps alone are left to torch"
    exact = score(packed(make_wide_model(family), torch.float32), rows())
    monkeypatch.setattr(operators, "amx_ops", lambda: None)
    by_torch = score(packed(make_wide_model(family), BF16), rows())

    def farthest(scores: list[Scores]) -> float:
        pairs = zip(scores, exact, strict=True)
        return max(
            abs((a - row.totals[0]) - (b - exact_row.totals[0]))
            for row, exact_row in pairs
            for a, b in zip(row.totals, exact_row.totals, strict=True)
        )

    assert farthest(by_amx) < 2 * farthest(by_torch) + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_bits_are_its_own(family: str, make_wide_model: Callable[[str], Path]) -> None:
    """A row's bits don't depend on the rows beside it, the threads, or whether weights are packed."""
    lm, questions = packed(make_wide_model(family), BF16), rows()
    together = score(lm, questions)
    assert bool(len(cast(CpuBackend, lm.backend).fused_layers)) == (family in QUICK)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert [score(lm, [question])[0] for question in questions] == together
        assert score(lm, questions[::-1]) == together[::-1]
        with lm.packed():
            assert bytes_to_pack(lm.layers) == 0
            assert score(lm, questions) == together


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))
@pytest.mark.parametrize("positions", ["l1", "f1"])
def test_a_kept_prefix_changes_no_bit(
    family: str, positions: str, make_wide_model: Callable[[str], Path]
) -> None:
    base = packed(make_wide_model(family), BF16)
    weights = merged(base, StoredWeights([], [stored_intervention(base, 1, positions, 1)]))
    cache, questions = PrefixCache(2**24), examples(6, prefix=tuple(range(100, 170)), longest=40)

    def ask(prefix_cache: PrefixCache | None) -> list[Scores]:
        answers: list[Scores] = []
        for batch in (questions[:1], questions[1:]):
            rows = [row(weights, question, prefix_cache) for question in batch]
            assert (
                prefix_cache is None
                or batch is not questions[1:]
                or all(scoring_row.cached_tokens >= 64 for scoring_row in rows)
            )
            answers += score_rows(rows, prefix_cache)
        return answers

    assert ask(cache) == ask(None)
    assert cache.used_bytes


@pytest.mark.parametrize("family", QUICK)
def test_nor_does_it_for_unmerged_models(family: str, make_wide_model: Callable[[str], Path]) -> None:
    """The models have LoRA of several ranks; DoRA is left out, because torch computes its products."""
    base = packed(make_wide_model(family), BF16)
    enable_row_adapters(base)
    stored_models = models(base, suffixes=("q_proj", "o_proj", "gate_proj", "down_proj"))
    without_dora = [
        stored for stored in stored_models if not any(adapter.magnitudes for adapter in stored.adapters)
    ]
    questions = examples(6, prefix=tuple(range(100, 170)), longest=40)
    for stored_model in without_dora:
        weights, cache = unmerged(base, stored_model, str(id(stored_model))), PrefixCache(2**24)
        fresh = [row(weights, question, None) for question in questions]
        score_rows([row(weights, questions[0], cache)], cache)
        cached = [row(weights, question, cache) for question in questions]
        assert any(scoring_row.cached_tokens for scoring_row in cached) or any(
            "f" in stored.positions for stored in stored_model.interventions
        )
        assert score_rows(cached, cache) == score_rows(fresh)


def test_what_a_broken_row_leaves_is_nobodys_prefix(make_wide_model: Callable[[str], Path]) -> None:
    """Keys and values left of a broken token may be no numbers either: other rows would take them for their own."""
    base = packed(make_wide_model("llama"), BF16)
    weights = merged(base, StoredWeights([], []))
    common, bad = tuple(range(100, 141)), 99
    with torch.no_grad():
        weights.lm.backbone.embed_tokens.weight[bad] = float("nan")
    cache = PrefixCache(2**24)
    questions = [
        Example(prompt=(*common, *rest), answers=((7,), (8,)), labels=("a", "b"), gold=0)
        for rest in ((bad, *range(200, 230)), tuple(range(300, 330)))
    ]
    alone = score_rows([row(weights, questions[1], None)])
    score_rows([row(weights, questions[0], cache)], cache)
    assert cache.used_bytes == 0
    assert score_rows([row(weights, questions[1], cache)], cache) == alone
    assert cache.used_bytes


def row(variant: ModelVariant, example: Example, cache: PrefixCache | None) -> ScoringRow:
    if cache is None:
        return ScoringRow(example=example, variant=variant)
    hashes = prefix_hashes(variant, example.prompt, scale=1.0, owner=None)
    return ScoringRow(example=example, variant=variant, hashes=hashes, cached_prefix=cache.find(hashes))


@pytest.mark.parametrize("family", QUICK)
def test_rows_of_many_models_score_as_alone_and_as_merged(
    family: str, make_wide_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA rows run through the layer's own modules; the other rows' bits must not change."""
    base = packed(make_wide_model(family), BF16)
    enable_row_adapters(base)
    stored_models = models(base, suffixes=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    variants = [unmerged(base, stored_model) for stored_model in stored_models] + [
        ModelVariant(lm=base, scope="base")
    ]
    questions = examples(len(variants) * 2, longest=90)
    mixed = [
        ScoringRow(example=question, variant=variants[index % len(variants)])
        for index, question in enumerate(questions)
    ]
    together = score_rows(mixed)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert [score_rows([scoring_row])[0] for scoring_row in mixed] == together
    gated: list[bool] = []
    run = AmxOps.gated_mlp

    def watched(*args: object) -> torch.Tensor:
        gated.append(True)
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(AmxOps, "gated_mlp", watched)
    with_dora = variants[2:4]
    plain = [scoring_row for scoring_row in mixed if scoring_row.variant not in with_dora]
    plain_scores = [
        scores for scoring_row, scores in zip(mixed, together, strict=True) if scoring_row in plain
    ]
    assert score_rows(plain) == plain_scores
    assert gated, "without DoRA, layers run in one go"
    for weights, stored_model in zip(variants, stored_models, strict=False):
        twin = merged(base, stored_model)
        questions_of_model = [scoring_row.example for scoring_row in mixed if scoring_row.variant is weights]
        for row_scores, merged_scores in zip(
            score_rows([ScoringRow(example=question, variant=weights) for question in questions_of_model]),
            score(twin.lm, questions_of_model),
            strict=True,
        ):
            gap = [scores.totals[0] - scores.totals[1] for scores in (row_scores, merged_scores)]
            assert gap[0] == pytest.approx(gap[1], abs=0.15)


def test_hooks_on_a_product_are_heeded(make_wide_model: Callable[[str], Path]) -> None:
    lm = packed(make_wide_model("llama"), BF16)
    before = score(lm, rows(3))
    handle = lm.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 0)
    assert score(lm, rows(3)) != before
    handle.remove()
    assert score(lm, rows(3)) == before
