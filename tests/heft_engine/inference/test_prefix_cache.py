"""Keys and values of prompt prefixes are reused by prompts that repeat them, and by no other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from many_models import StoredWeights, adapter, examples, merged, stored_intervention, unmerged
from probe_models import packed
from tiny_models import FAMILIES
from torch import Tensor

from heft_engine.data.encoding import Example
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import (
    BLOCK_TOKENS,
    PrefixCache,
    block_hashes,
    prefix_hashes,
    reusable_prefix,
)
from heft_engine.inference.scoring import Scores, ScoringRow, score_rows
from heft_engine.model import attention, layout
from heft_engine.model.layout import Layout, PackedRow, PrefixKV
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.row_adapters import enable_row_adapters

MakeModel = Callable[[str], Path]
PASSAGE = tuple(range(100, 170))


def row(variant: ModelVariant, example: Example, cache: PrefixCache, scale: float = 1.0) -> ScoringRow:
    """Returns a row as the batcher makes it."""
    hashes = prefix_hashes(variant, example.prompt, scale=scale, owner=None)
    return ScoringRow(
        example=example, variant=variant, scale=scale, hashes=hashes, cached_prefix=cache.find(hashes)
    )


def ask(
    variant: ModelVariant, questions: Sequence[Example], cache: PrefixCache, scale: float = 1.0
) -> tuple[list[Scores], list[int]]:
    """Returns scores, and the cached tokens of each row."""
    rows = [row(variant, example, cache, scale) for example in questions]
    return score_rows(rows, cache), [scoring_row.cached_tokens for scoring_row in rows]


def plain(variant: ModelVariant, questions: Sequence[Example], scale: float = 1.0) -> list[Scores]:
    return score_rows([ScoringRow(example=question, variant=variant, scale=scale) for question in questions])


def same(actual: Sequence[Scores], expected: Sequence[Scores], tolerance: float = 2e-4) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert left.totals == pytest.approx(right.totals, abs=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["l1", "f2+l3", "f1"])
def test_questions_on_one_passage_share_its_prefill(
    family: str, positions: str, make_tiny_model: MakeModel
) -> None:
    base = packed(make_tiny_model(family))
    variant = merged(
        base,
        StoredWeights(
            [], [stored_intervention(base, 1, positions, 1), stored_intervention(base, 2, "l1", 2)]
        ),
    )
    cache = PrefixCache(2**24)
    questions = examples(5, prefix=PASSAGE, longest=40)
    first, cached_tokens = ask(variant, questions[:1], cache)
    assert first == plain(variant, questions[:1])
    assert cached_tokens == [0]
    rest, cached_tokens = ask(variant, questions[1:], cache)
    assert cached_tokens == [len(PASSAGE) // BLOCK_TOKENS * BLOCK_TOKENS] * 4
    same(rest, plain(variant, questions[1:]))
    # Longer than the cached prefix, and longer again: each extends the last.
    longer = [replace(question, prompt=(*question.prompt, *range(200, 260))) for question in questions]
    _, cached_tokens = ask(variant, longer, cache)
    assert min(cached_tokens) >= 64
    longest = [replace(question, prompt=(*question.prompt, *range(300, 330))) for question in longer]
    again, cached_tokens = ask(variant, longest, cache)
    assert min(cached_tokens) >= 112
    same(again, plain(variant, longest))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_on_one_passage_attend_to_it_together(
    family: str, make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = packed(make_tiny_model(family))
    variant = merged(base, StoredWeights([], [stored_intervention(base, 1, "l1", 1)]))
    cache = PrefixCache(2**24)
    passages = (PASSAGE, tuple(range(300, 380)))
    questions = [question for prefix in passages for question in examples(9, prefix=prefix, longest=40)]
    ask(variant, [questions[0], questions[9]], cache)
    # Interleaved, as from two requests, with a question that shares no prefix.
    mixed = [question for pair in zip(questions[1:9], questions[10:], strict=True) for question in pair]
    mixed.insert(3, examples(1, seed=5)[0])
    sizes: list[list[int]] = []
    attend = attention._masked

    def watch(query: Tensor, key: Tensor, *more: Any) -> Tensor:
        sizes.append([query.shape[2], key.shape[2]])
        return attend(query, key, *more)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_masked", watch)
        scores, cached_tokens = ask(variant, mixed, cache)
    assert sum(map(bool, cached_tokens)) == 16
    same(scores, plain(variant, mixed))
    several = [queries for queries, _ in sizes if queries > 41]
    assert len(several) >= 2 * base.n_layers, "none attended together"
    assert max(several) <= layout.GROUP_TOKENS
    longer = [replace(question, prompt=(*question.prompt, *range(200, 260))) for question in questions]
    ask(variant, longer, cache)
    again, cached_tokens = ask(variant, longer, cache)
    assert min(cached_tokens) > 100, "the prefix that grouped rows leave is stored for each row"
    same(again, plain(variant, longer))


def test_neighbours_with_the_same_cached_prefix_form_a_group() -> None:
    def rows(*branches: tuple[int, ...]) -> tuple[PackedRow, ...]:
        return tuple(
            PackedRow(start=50 * index, prompt=90, branches=row_branches, cached_tokens=40)
            for index, row_branches in enumerate(branches)
        )

    def runs(prefixes: tuple[Any, ...] | None, *branches: tuple[int, ...]) -> list[tuple[int, int]]:
        return [
            (group.first, group.end)
            for group in Layout(rows=rows(*branches), cached_prefixes=prefixes).groups
        ]

    a, b = object(), object()
    assert runs((a, a, a, b, b), (), (), (), (), ()) == [(0, 3), (3, 5)]
    assert runs((a, a, a, a), (), (), (), ()) == [(0, 3), (3, 4)], "up to a number of tokens"
    assert runs((a, a, a), (), (2, 1), ()) == [(0, 1), (1, 2), (2, 3)], "branches don't see each other"
    assert runs((None, None, a), (), (), ()) == [(0, 1), (1, 2), (2, 3)]
    assert runs(None, (), ()) == [(0, 1), (1, 2)]


def test_unmerged_models_find_only_their_own_prefixes(tiny_llama_dir: Path) -> None:
    base = packed(tiny_llama_dir)
    enable_row_adapters(base)
    cache = PrefixCache(2**24)
    models = [
        unmerged(
            base, StoredWeights([adapter(base, 2, seed, suffixes=("q_proj", "v_proj"))], []), scope=f"m{seed}"
        )
        for seed in (1, 2)
    ]
    questions = examples(3, prefix=PASSAGE)
    for variant in models:
        assert ask(variant, questions[:1], cache)[1] == [0], "another model's keys and values were found"
    for variant in models:
        scores, cached_tokens = ask(variant, questions[1:], cache)
        assert min(cached_tokens) == 64
        same(scores, plain(variant, questions[1:]))


def test_nothing_after_an_intervention_is_cached_and_the_scale_is_part_of_the_key_of_f_positions(
    tiny_llama_dir: Path,
) -> None:
    base = packed(tiny_llama_dir)
    questions = examples(2, prefix=PASSAGE)
    last = merged(base, StoredWeights([], [stored_intervention(base, 1, "l40", 1)]))
    assert reusable_prefix(last.interventions, 100, 1.0) == (60, None)
    assert reusable_prefix(last.interventions, 60, 1.0) == (30, None)  # clamped to half of the prompt
    assert reusable_prefix(last.interventions, 100, 0.0) == (99, None)
    first = merged(base, StoredWeights([], [stored_intervention(base, 1, "f3", 1)]))
    assert reusable_prefix(first.interventions, 100, 0.5) == (99, (0.5, (3,)))
    assert reusable_prefix(first.interventions, 4, 0.5) == (3, (0.5, (2,)))
    cache = PrefixCache(2**24)
    for scale in (1.0, 0.5, 0.0):
        assert ask(first, questions[:1], cache, scale)[1] == [0]
        scores, cached_tokens = ask(first, questions[1:], cache, scale)
        assert cached_tokens == [64]
        same(scores, plain(first, questions[1:], scale))


def test_a_block_hash_covers_the_scope_and_all_earlier_tokens() -> None:
    tokens = tuple(range(100))
    hashes = block_hashes("a", tokens, 99)
    assert len(hashes) == 99 // BLOCK_TOKENS
    assert block_hashes("a", (*tokens[:40], 7, *tokens[41:]), 99)[:2] == hashes[:2]
    changed = block_hashes("a", (7, *tokens[1:]), 99)
    assert not set(changed) & set(hashes)
    assert not set(block_hashes("b", tokens, 99)) & set(hashes)
    assert block_hashes("a", tokens, BLOCK_TOKENS - 1) == []


def filled(cache: PrefixCache, lm: PackedLM, prompts: Sequence[tuple[int, ...]], scope: str = "s") -> None:
    variant = ModelVariant(lm=lm, scope=scope)
    for prompt in prompts:
        ask(variant, [Example(prompt=prompt, answers=((7,), (9,)), labels=("a", "b"), gold=None)], cache)


def cached_prefix(cache: PrefixCache, prompt: tuple[int, ...], scope: str = "s") -> PrefixKV | None:
    return cache.find(block_hashes((None, scope, None), prompt, len(prompt) - 1))


def test_the_least_recently_used_block_is_evicted_first_and_no_block_with_successors(
    tiny_llama_dir: Path,
) -> None:
    lm = packed(tiny_llama_dir)
    a_token = lm.n_layers * 2 * 2 * 8 * 4
    prompts = [tuple(range(start, start + 65)) for start in (10, 110, 210)]
    cache = PrefixCache(3 * 64 * a_token)
    filled(cache, lm, prompts)
    assert cache.used_bytes == 3 * 64 * a_token
    longer = (*prompts[0], *range(400, 450))
    filled(cache, lm, [longer])  # extends the first, and evicts the second
    assert cached_prefix(cache, prompts[1]) is None
    prefix = cached_prefix(cache, longer)
    assert prefix is not None
    assert prefix.length == 112
    filled(cache, lm, [prompts[1], prompts[1][::-1]])
    assert cache.used_bytes <= cache.budget_bytes
    for prompt in (longer, *prompts):
        chained = cached_prefix(cache, prompt)
        if chained is not None:
            keys, values = chained.keys_values(0)
            assert keys.shape == values.shape == (1, 2, chained.length, 8)


def test_a_removed_scope_leaves_no_bytes(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    cache = PrefixCache(2**24)
    filled(cache, lm, [PASSAGE, (*PASSAGE, *PASSAGE)], scope="gone")
    used_bytes = cache.used_bytes
    filled(cache, lm, [PASSAGE], scope="stays")
    assert cache.used_bytes > used_bytes
    cache.remove("gone")
    assert cached_prefix(cache, PASSAGE, "gone") is None
    assert cached_prefix(cache, PASSAGE, "stays") is not None
    cache.remove("stays")
    assert cache.used_bytes == 0


def test_without_a_budget_nothing_is_cached(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    cache = PrefixCache(100)
    filled(cache, lm, [PASSAGE])
    assert cache.used_bytes == 0
    assert cached_prefix(cache, PASSAGE) is None


def test_cached_prefixes_score_alike_while_entries_are_evicted(tiny_llama_dir: Path) -> None:
    """Long and short prompts with common prefixes, in a cache that is always too small."""
    lm = packed(tiny_llama_dir)
    variant = ModelVariant(lm=lm, scope="s")
    cache = PrefixCache(lm.n_layers * 2 * 2 * 8 * 4 * 160)
    generator = torch.Generator().manual_seed(0)
    stems = [tuple(torch.randint(5, 600, (48,), generator=generator).tolist()) for _ in range(3)]
    hits = 0
    for first, second, third in itertools.product(range(3), repeat=3):
        prompt = (*stems[first], *stems[second], *stems[third][: 10 * third + 3])
        example = Example(prompt=prompt, answers=((7,), (9,)), labels=("a", "b"), gold=None)
        scores, cached_tokens = ask(variant, [example], cache)
        same(scores, plain(variant, [example]))
        hits += sum(cached_tokens)
        assert cache.used_bytes <= cache.budget_bytes
    assert hits > 500
