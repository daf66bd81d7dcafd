"""One varlen call a layer attends as rows one at a time do: its reference kernel against today's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import LORA, REFT, but
from many_models import StoredWeights, examples, merged, stored_intervention
from probe_models import packed
from tiny_models import FAMILIES
from torch import Tensor
from varlen_reference import use_reference

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.reft import ReftAdapter
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.inference.prefix_cache import PrefixCache, prefix_hashes
from heft_engine.inference.scoring import ScoringRow, score, score_rows
from heft_engine.model import varlen_attention
from heft_engine.model.layout import AttentionOptions
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.activation_cache import SuffixCache
from heft_engine.training.forward_pass import ForwardPass, FullPass, SuffixPass, summed_loss

MakeModel = Callable[[str], Path]
#: Gemma 2 caps its scores, which the kernel does not do.
SUPPORTED = [family for family in FAMILIES if family != "gemma2"]
#: Within the tiny models' window of 16 and beyond it.
ROWS = [Example(prompt=(7, 8, 9) * n, answers=((5, n, 6),), labels=("",), gold=0) for n in (1, 4, 13)]
SCORES, GRADIENTS = 2e-6, 6e-6


def loss_and_gradients(forward: ForwardPass, adapter: Adapter) -> tuple[Tensor, list[Tensor]]:
    """Returns the loss a token, and its gradients."""
    rows = range(len(ROWS))
    loss = summed_loss(forward, SupervisedObjective(), rows) / sum(len(row.answers[0]) for row in ROWS)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = adapter.parameters().values()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    assert gradients
    return loss.detach(), gradients


def compare(
    monkeypatch: pytest.MonkeyPatch, forward: Callable[[], ForwardPass], adapter: Adapter
) -> list[int]:
    """Compares losses and gradients both ways. Returns the layers of the varlen calls."""
    loss, gradients = loss_and_gradients(forward(), adapter)
    layers = use_reference(monkeypatch)
    varlen_loss, varlen_gradients = loss_and_gradients(forward(), adapter)
    torch.testing.assert_close(varlen_loss, loss, rtol=SCORES, atol=SCORES)
    for actual, expected in zip(varlen_gradients, gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=GRADIENTS, atol=GRADIENTS)
    return layers


@pytest.mark.parametrize("family", SUPPORTED)
def test_training_rows(make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    lm = packed(make_tiny_model(family))
    torch.manual_seed(0)
    adapter = LoraAdapter.attach(lm, but(LORA, target_modules=list(lm.family.attention)))
    layers = compare(monkeypatch, lambda: FullPass(lm=lm, examples=ROWS), adapter)
    assert layers == list(range(lm.n_layers)), "one call a layer"


@pytest.mark.parametrize("level", [CacheLevel.KV, CacheLevel.HIDDEN_STATES])
@pytest.mark.parametrize("family", SUPPORTED)
def test_suffixes(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, level: CacheLevel
) -> None:
    lm = packed(make_tiny_model(family))
    torch.manual_seed(0)
    adapter = ReftAdapter.attach(lm, but(REFT, layers=[1], positions="l2"))
    adapter.train(False)

    def forward() -> ForwardPass:
        return SuffixPass(cache=SuffixCache(lm, adapter.boundary(), ROWS, level))

    layers = compare(monkeypatch, forward, adapter)
    above = list(range(adapter.boundary().layer, lm.n_layers))
    assert layers[-len(above) :] == above, "one call a layer of the suffixes' pass"


@pytest.mark.parametrize("family", SUPPORTED)
def test_branches_and_cached_prefixes(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Scores of fresh rows, of rows that fill the prefix cache, and of rows that continue it, from one pass each."""
    base = packed(make_tiny_model(family))
    variant = merged(base, StoredWeights([], [stored_intervention(base, 1, "l1", 1)]))
    questions = [
        Example(prompt=question.prompt, answers=((5, 6, 7), (8,), (9, 4)), labels=("a", "b", "c"), gold=0)
        for question in examples(4, prefix=tuple(range(100, 170)), longest=40)
    ]
    others = examples(2, longest=30)

    found: list[bool] = []

    def totals(questions: Sequence[Example], cache: PrefixCache | None) -> list[float]:
        rows = []
        for question in questions:
            hashes = prefix_hashes(variant, question.prompt, scale=1.0, owner=None) if cache else []
            prefix = cache.find(hashes) if cache else None
            found.append(prefix is not None)
            rows.append(ScoringRow(example=question, variant=variant, hashes=hashes, cached_prefix=prefix))
        return [total for scores in score_rows(rows, cache) for total in scores.totals]

    expected = totals([*questions, *others], None)
    layers = use_reference(monkeypatch)
    assert totals([*questions, *others], None) == pytest.approx(expected, abs=SCORES, rel=SCORES)
    assert layers
    cache = PrefixCache(2**24)
    filling = totals(questions[:1], cache)
    assert cache.used_bytes > 0
    found.clear()
    continuing = totals([*questions[1:], *others], cache)
    assert found == [True] * 3 + [False] * 2, "rows continue the cached prefix"
    assert filling + continuing == pytest.approx(expected, abs=SCORES, rel=SCORES)


@torch.inference_mode()
def test_validation_rows_without_a_prefix(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one token: nothing is left of the last position, and nothing is intervened on."""
    lm = packed(tiny_llama_dir)
    adapter = ReftAdapter.attach(lm, but(REFT, layers=[1], positions="l1"))
    adapter.train(False)
    rows = [Example(prompt=(7,), answers=((5, n),), labels=("",), gold=0) for n in range(3)]
    forward = SuffixPass(cache=SuffixCache(lm, adapter.boundary(), rows, CacheLevel.KV))
    loss = summed_loss(forward, SupervisedObjective(), range(3))
    layers = use_reference(monkeypatch)
    varlen_loss = summed_loss(forward, SupervisedObjective(), range(3))
    assert layers
    torch.testing.assert_close(varlen_loss, loss, rtol=SCORES, atol=SCORES)


def test_rows_that_would_gather_too_many_keys_attend_alone(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = packed(tiny_llama_dir)
    layers = use_reference(monkeypatch)
    # 40 tokens with a branch each for three answers: 40 + 3 * 41 + 2 keys.
    choices = [Example(prompt=(7,) * 40, answers=((5, 6), (8, 3), (9, 4, 1)), labels=("a", "b", "c"), gold=0)]
    together = score(lm, choices)
    assert layers
    layers.clear()
    monkeypatch.setattr(varlen_attention, "MOST_KEYS", 100)
    assert score(lm, choices)[0].totals == pytest.approx(together[0].totals, abs=SCORES, rel=SCORES)
    assert not layers
    assert score(lm, [replace(choices[0], prompt=(7,) * 110, answers=((5,),), labels=("a",))])
    assert layers, "a pass that gathers nothing is of any length"


@pytest.mark.parametrize(
    ("dtype", "width", "softcap", "capability", "expected"),
    [
        (torch.bfloat16, 128, None, (8, 0), True),
        (torch.float16, 256, None, (12, 0), True),
        (torch.float32, 128, None, (9, 0), False),
        (torch.bfloat16, 128, 50.0, (9, 0), False),
        (torch.bfloat16, 100, None, (9, 0), False),
        (torch.bfloat16, 224, None, (9, 0), False),
        (torch.bfloat16, 512, None, (9, 0), False),
        (torch.float16, 128, None, (7, 5), False),
    ],
)
def test_what_the_kernel_refuses_keeps_its_way(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    width: int,
    softcap: float | None,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    class Query:
        device, shape = torch.device("cuda", 0), (1, 2, 3, width)

    query = Query()
    query.dtype = dtype  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    varlen_attention._has_kernel.cache_clear()
    options = AttentionOptions(softcap=softcap)
    assert varlen_attention.is_supported(query, options) == expected  # type: ignore[arg-type]
    varlen_attention._has_kernel.cache_clear()
    assert not varlen_attention.is_supported(torch.zeros(1, 2, 3, 128, dtype=torch.bfloat16), options)
