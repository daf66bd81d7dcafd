"""Scores: their definition, and their independence, bit for bit, of the other rows of a pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_limit import limit_pass_tokens
from probe_models import with_intervention
from transformers import AutoModelForCausalLM

from heft_engine.data.encoding import Example
from heft_engine.errors import OutOfMemory
from heft_engine.inference import partition
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.prefix_cache import PrefixCache, prefix_hashes
from heft_engine.inference.scoring import Scores, ScoringRow, score, score_or_fail_rows, score_rows
from heft_engine.model import attention, batch_invariant
from heft_engine.model.packed_lm import PackedLM

#: torch's own products: layers on AMX are tested in tests/heft_engine/cpu.
pytestmark = pytest.mark.usefixtures("without_amx")

MakeModel = Callable[[str], Path]


def packed(path: Path, dtype: torch.dtype = torch.float32) -> PackedLM:
    """A packed model with an intervention at the last prompt token, whose product has one row for each example."""
    return with_intervention(path, "l1", dtype)


def questions(n: int) -> list[Example]:
    """Prompts of 2 to 90 tokens, single labels and longer choices mixed."""
    rng = random.Random(0)
    examples = []
    for index in range(n):
        prompt = tuple(rng.randrange(5, 600) for _ in range(rng.randint(2, 90)))
        choices = ((7,), (8,)) if index % 3 else ((7, 9, 11), (8,), (30, 31) * 9)
        labels = tuple(map(str, range(len(choices))))
        examples.append(Example(prompt=prompt, answers=choices, labels=labels, gold=0))
    return examples


def totals(lm: PackedLM, examples: list[Example]) -> list[tuple[float, ...]]:
    return [scores.totals for scores in score(lm, examples)]


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(
    make_tiny_model: MakeModel, family: str, threads: int, dtype: torch.dtype
) -> None:
    """Rows are scored alone, with all others, in another order and number. Three threads split work unevenly."""
    torch.set_num_threads(threads)
    lm, examples = packed(make_tiny_model(family), dtype), questions(24)
    alone = [totals(lm, [example])[0] for example in examples]
    assert len(set(alone)) == len(examples)
    assert totals(lm, examples) == alone
    assert totals(lm, examples[::-1]) == alone[::-1]
    assert totals(lm, examples[3:20]) == alone[3:20]
    assert totals(lm, examples * 3) == alone * 3


def test_many_passes_give_the_scores_of_one(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, examples = packed(tiny_llama_dir), questions(30)
    whole = totals(lm, examples)
    monkeypatch.setattr(partition, "TOKEN_BUDGET", 100)
    assert totals(lm, examples) == whole
    assert totals(lm, []) == []


def test_totals_are_the_summed_log_probabilities_of_the_models_own_forward(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    lm.interventions.clear()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="eager")

    def log_probability(prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    for example, scores in zip(questions(9), score(lm, questions(9)), strict=True):
        exact = [log_probability(example.prompt, answer) for answer in example.answers]
        if max(map(len, example.answers)) == 1:  # up to a constant
            offset = scores.totals[0] - exact[0]
            exact = [value + offset for value in exact]
        assert scores.totals == pytest.approx(exact, abs=1e-4)
        lengths = map(len, example.answers)
        assert scores.means == tuple(total / n for total, n in zip(scores.totals, lengths, strict=True))


def test_the_summed_probability_decides_and_the_first_of_equals() -> None:
    # By the mean the second would win.
    assert Scores(totals=(-2.0, -3.0), means=(-2.0, -1.0)).best == 0
    assert Scores(totals=(-3.0, -1.0, -1.0), means=(-3.0, -1.0, -1.0)).best == 1


def test_probabilities_are_a_softmax_that_survives_any_size() -> None:
    shared = Scores(totals=(-1.0, -2.0, -4.0), means=()).probabilities
    weights = [math.exp(-1), math.exp(-2), math.exp(-4)]
    assert shared == pytest.approx([w / sum(weights) for w in weights])
    assert Scores(totals=(-5_000.0, -5_000.0), means=()).probabilities == (0.5, 0.5)
    assert Scores(totals=(0.0, -5_000.0), means=()).probabilities == (1.0, 0.0)


def long_rows(*lengths: int) -> list[Example]:
    return [Example(prompt=(5,) * n, answers=((7,), (8,)), labels=("a", "b"), gold=0) for n in lengths]


def test_only_small_masks_are_cached(make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sliding window every longer row has its own mask, with as many entries as its length squared."""
    lm = packed(make_tiny_model("mistral"))
    computed: list[tuple[int, ...]] = []
    mask = attention._mask

    def recording_mask(lengths: tuple[int, ...], *options: Any) -> torch.Tensor:
        computed.append(lengths)
        return mask(lengths, *options)

    monkeypatch.setattr(attention, "_mask", recording_mask)
    monkeypatch.setattr(attention, "_MOST_CACHED", 90 * 90)
    score(lm, long_rows(70, 90))
    cached = [lengths for lengths in computed if lengths in ((70,), (90,))]
    assert sorted(cached) == [(70,), (90,)], "one mask for each length, shared by all layers"
    computed.clear()
    score(lm, long_rows(92, 100))
    assert len([lengths for lengths in computed if lengths == (100,)]) == lm.n_layers


def test_a_pass_ends_on_a_whole_block(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every product would copy its rows to pad them."""
    lm, padded = packed(tiny_llama_dir), []
    monkeypatch.setattr(batch_invariant.F, "pad", lambda *rows: padded.append(rows) or F.pad(*rows))
    lm.interventions.clear()
    score(lm, long_rows(3, 41, 50))
    assert not padded


def test_a_pass_without_memory_is_run_again_in_halves(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, examples = packed(tiny_llama_dir), questions(24)
    before = totals(lm, examples)
    passes = limit_pass_tokens(monkeypatch, 200)
    after = totals(lm, examples)
    assert max(passes) > 200
    assert len(passes) > 8
    for row, expected in zip(after, before, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_a_row_without_memory_fails_alone(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, examples = packed(tiny_llama_dir), long_rows(60, 300, 50)
    expected = totals(lm, examples)
    limit_pass_tokens(monkeypatch, 200)
    rows = [ScoringRow(example=example, variant=ModelVariant(lm=lm)) for example in examples]
    first, failed, last = score_or_fail_rows(rows)
    assert isinstance(failed, OutOfMemory)
    assert "no memory for a row of 300 tokens" in failed.message
    assert failed.__context__ is None, "an exception's frames would hold the tensors of the failed pass"
    for outcome, row in ((first, expected[0]), (last, expected[2])):
        assert isinstance(outcome, Scores)
        assert outcome.totals == pytest.approx(row, abs=1e-4)
    with pytest.raises(OutOfMemory) as raised:
        score(lm, examples)
    assert raised.value.code == "out_of_memory"


def test_a_failed_pass_caches_nothing(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = packed(tiny_llama_dir)
    variant, cache, rows = ModelVariant(lm=lm, scope="model"), PrefixCache(2**24), []
    for example in long_rows(120, 130):
        hashes = prefix_hashes(variant, example.prompt, scale=1.0, owner=None)
        rows.append(ScoringRow(example=example, variant=variant, hashes=hashes))
    with monkeypatch.context() as patch:
        limit_pass_tokens(patch, 200)
        patch.setattr(partition, "job_threads", lambda device: 1)
        scores = score_rows(rows, cache)
    assert cache.used_bytes == 0
    assert score_rows(rows, cache) == scores
    assert cache.used_bytes > 0


def test_another_error_is_not_taken_for_a_lack_of_memory(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = packed(tiny_llama_dir)

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(lm, "run_layers", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        score(lm, questions(3))
