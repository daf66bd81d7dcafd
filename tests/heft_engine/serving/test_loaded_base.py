"""Rows of many models on one base score as their merged models do, and to the bit as each does alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from many_models import StoredWeights, adapter, examples, merged, models, stored_intervention, unmerged
from probe_models import packed
from tiny_models import FAMILIES

from heft_engine.errors import BundleError
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.scoring import Scores, ScoringRow, score, score_rows
from heft_engine.serving.row_adapters import UnmergedModel, enable_row_adapters
from heft_engine.serving.shared_copy import unique_bytes

MakeModel = Callable[[str], Path]


def modules(family: str) -> tuple[str, ...]:
    return ("query_key_value", "dense_4h_to_h") if family == "gpt_neox" else ("q_proj", "v_proj", "down_proj")


def close(first: Scores, second: Scores, tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(first.totals, second.totals, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_models_in_one_pass_score_as_their_merged_models(
    family: str, make_tiny_model: MakeModel
) -> None:
    base = packed(make_tiny_model(family))
    enable_row_adapters(base)
    stored = models(base, suffixes=modules(family))
    rows, expected = [], []
    for index, weights in enumerate([*stored, StoredWeights([], [])]):
        reference, scale = merged(base, weights), 1.0 if index % 2 else 0.5
        questions = examples(4, seed=index)
        variant = unmerged(base, weights)
        rows += [ScoringRow(example=example, variant=variant, scale=scale) for example in questions]
        expected += score(reference.lm, questions, scale=scale)
    order = [(7 * index) % len(rows) for index in range(len(rows))]
    together = score_rows([rows[index] for index in order])
    for scores, index in zip(together, order, strict=True):
        assert close(scores, expected[index], 2e-4)
        assert scores == score_rows([rows[index]])[0], "bits depend on the neighbours"
    plain = score(packed(make_tiny_model(family)), [rows[-1].example])
    assert score_rows([rows[0], rows[-1]])[1:] == plain, "a row without an adapter is as before, to the bit"


@pytest.mark.parametrize("threads", [1, 3])
def test_in_bfloat16_a_row_keeps_its_bits_beside_others(tiny_llama_dir: Path, threads: int) -> None:
    """Rows in parallel on one thread each, and a single row on all threads."""
    torch.set_num_threads(threads)
    base = packed(tiny_llama_dir, torch.bfloat16)
    enable_row_adapters(base)
    variants = [unmerged(base, weights) for weights in models(base, suffixes=modules("llama"))]
    rows = [
        ScoringRow(example=example, variant=variants[index % len(variants)])
        for index, example in enumerate(examples(24, longest=120))
    ]
    assert score_rows(rows) == [score_rows([row])[0] for row in rows]


def test_a_pass_keeps_no_evicted_model_alive(tiny_llama_dir: Path) -> None:
    torch.set_num_threads(3)
    base = packed(tiny_llama_dir)
    enable_row_adapters(base)
    variant = unmerged(base, models(base, suffixes=modules("llama"))[0])
    gone = weakref.ref(variant.adapter)
    score_rows([ScoringRow(example=example, variant=variant) for example in examples(9)])
    del variant
    gc.collect()
    assert gone() is None


def test_texts_of_many_models_are_decoded_together(tiny_llama_dir: Path) -> None:
    base = packed(tiny_llama_dir)
    enable_row_adapters(base)
    stored = models(base, suffixes=modules("llama"))
    requests, expected = [], {}
    for index, weights in enumerate(stored):
        prompt = examples(1, seed=index)[0].prompt
        adapted = unmerged(base, weights).adapter
        requests.append(DecodeRequest(id=index, prompt=prompt, max_tokens=8, adapter=adapted))
        request = DecodeRequest(id=index, prompt=prompt, max_tokens=8)
        expected |= decode_all(DecodeBatch(merged(base, weights).lm, budget_bytes=2**24), [request])
    assert decode_all(DecodeBatch(base, budget_bytes=2**24), requests) == expected


def decode_all(batch: DecodeBatch, requests: list[DecodeRequest]) -> dict[object, list[int]]:
    tokens: dict[object, list[int]] = {request.id: [] for request in requests}
    new = batch.prefill(requests)
    while new:
        for request_id, sampled in new.items():
            tokens[request_id].append(sampled.token)
            if len(tokens[request_id]) == 8:
                batch.remove(request_id)
        new = batch.decode()
    return tokens


def test_the_memory_of_an_unmerged_model_is_that_of_its_adapters(tiny_llama_dir: Path) -> None:
    base = packed(tiny_llama_dir, torch.bfloat16)
    lora = adapter(base, 4, 1, suffixes=("q_proj", "v_proj"))
    numbers = sum(down.numel() + up.numel() for down, up in lora.factors.values())
    model = UnmergedModel(base, [lora], [stored_intervention(base, 1, "l1", 2)])
    assert model.memory_bytes == 2 * numbers + 4 * (2 * 32 * 2 + 2)


def test_a_merged_copy_costs_what_its_adapters_touch(tiny_llama_dir: Path) -> None:
    base = packed(tiny_llama_dir)
    enable_row_adapters(base)
    before = [parameter.clone() for parameter in base.model.parameters()]
    copy = merged(base, StoredWeights([adapter(base, 4, 1, suffixes=("q_proj",))], []))
    assert unique_bytes(copy.lm, beside=base) == 4 * base.n_layers * 32 * 32
    assert all(map(torch.equal, before, base.model.parameters()))
    questions = examples(3)
    assert score(copy.lm, questions) != score(base, questions)
    # The copy's layers ignore the adapters of the base's rows.
    adapted = unmerged(base, models(base, suffixes=("q_proj",))[0]).adapter
    variant = ModelVariant(lm=copy.lm, adapter=adapted)
    rows = [ScoringRow(example=example, variant=variant) for example in questions]
    assert score_rows(rows) == score(copy.lm, questions)


def test_weights_of_another_base_are_refused(tiny_llama_dir: Path, make_tiny_model: MakeModel) -> None:
    base = packed(tiny_llama_dir)
    good = adapter(base, 2, 1, suffixes=("q_proj",))
    name = next(iter(good.factors))
    good.factors[name] = (torch.zeros(2, 31), torch.zeros(32, 2))
    with pytest.raises(BundleError, match=f"{name} is \\(32, 31\\), the base's \\(32, 32\\)"):
        UnmergedModel(base, [good], [])
    with pytest.raises(BundleError, match="which is no linear layer of this base model"):
        UnmergedModel(packed(make_tiny_model("gpt_neox")), [good], [])
    with pytest.raises(BundleError, match="layers"):
        UnmergedModel(base, [], [stored_intervention(base, 4, "l1", 1)])


def test_variants_list_their_interventions(tiny_llama_dir: Path) -> None:
    base = packed(tiny_llama_dir)
    stored = StoredWeights([], [stored_intervention(base, 1, "l1", 1), stored_intervention(base, 3, "f1", 2)])
    assert [(s.layer, s.positions) for s in unmerged(base, stored).interventions] == [(1, "l1"), (3, "f1")]
    assert [(s.layer, s.positions) for s in merged(base, stored).interventions] == [(1, "l1"), (3, "f1")]
    assert ModelVariant(lm=base).interventions == ()
