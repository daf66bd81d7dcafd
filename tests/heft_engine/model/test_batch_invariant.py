"""Batch invariance: a row's numbers don't depend on the rows beside it, nor on the number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from needs import needs_runtime
from probe_models import with_intervention
from torch import nn

from heft_engine.data.encoding import Example
from heft_engine.inference.scoring import score
from heft_engine.model import batch_invariant
from heft_engine.model.batch_invariant import BatchInvariantMode
from heft_engine.runtime.parallel import one_thread

pytestmark = pytest.mark.usefixtures("without_amx", "batch_invariant")

THREADS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(count: int) -> list[Example]:
    """Prompts of 2 to 150 tokens, single labels and longer choices mixed."""
    chance = random.Random(0)
    examples = []
    for index in range(count):
        prompt = tuple(chance.randrange(5, 600) for _ in range(chance.randint(2, 150)))
        choices = ((7,), (8,)) if index % 3 else ((7, 9, 11), (8,), (30, 31) * 9)
        labels = tuple(map(str, range(len(choices))))
        examples.append(Example(prompt=prompt, answers=choices, labels=labels, gold=0))
    return examples


@needs_runtime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox"]
)
def test_a_rows_scores_are_its_own(
    make_tiny_model: Callable[[str], Path], family: str, dtype: torch.dtype
) -> None:
    """A row has the same scores alone, among others, in another order, with any number of threads."""
    # The intervention multiplies one row alone when it is scored alone.
    lm, examples = with_intervention(make_tiny_model(family), "l1", dtype), rows(7)

    def totals(selected: list[Example]) -> list[tuple[float, ...]]:
        return [scores.totals for scores in score(lm, selected)]

    torch.set_num_threads(1)
    alone = [totals([example])[0] for example in examples]
    assert len(set(alone)) == len(examples)
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert totals(examples) == alone, threads
        assert totals(examples[::-1]) == alone[::-1], threads
        assert totals(examples[2:5]) == alone[2:5], threads
        for index in (0, 3):
            assert totals([examples[index]]) == [alone[index]], threads


def test_products_are_torchs_own_unless_the_bits_are_asked_for(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default the scores agree to rounding, and no product is cut into blocks."""
    examples = rows(7)
    exact = score(with_intervention(tiny_llama_dir, "l1"), examples)
    monkeypatch.delenv("HEFT_BATCH_INVARIANT")
    monkeypatch.setattr(batch_invariant, "linear_in_blocks", None)
    lm = with_intervention(tiny_llama_dir, "l1")
    together, alone = score(lm, examples), [score(lm, [example])[0] for example in examples]
    for row in zip(exact, together, alone, strict=True):
        assert row[1].totals == pytest.approx(row[0].totals, abs=1e-5)
        assert row[2].totals == pytest.approx(row[0].totals, abs=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(320, 192), (50, 48), (1_100, 64)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layers_rows_are_the_same_in_passes_of_every_length(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(*shape[::-1], bias=bias, dtype=dtype), torch.randn(700, shape[1], dtype=dtype)
    torch.set_num_threads(1)
    with BatchInvariantMode():
        whole = layer(x)
    torch.testing.assert_close(whole, layer(x))
    for threads in THREADS:
        torch.set_num_threads(threads)
        with one_thread(), BatchInvariantMode():
            for count in (1, 5, 95, 96, 97, 300):
                assert torch.equal(layer(x[:count]), whole[:count]), (threads, count)
                assert torch.equal(layer(x[77 : 77 + count]), whole[77 : 77 + count]), (threads, count)
            assert torch.equal(layer(x[None, -1:]), whole[None, -1:])
            assert layer(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("activation", [F.silu, lambda x: F.gelu(x, approximate="tanh")])
@pytest.mark.parametrize("width", [64, 100, 1_536])
def test_an_activations_bits_do_not_depend_on_where_a_row_lies(
    activation: Any, width: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(1, 300, width)
    with one_thread(), BatchInvariantMode():
        together = activation(x)
        alone = torch.cat([activation(x[:, i : i + 1]) for i in range(300)], dim=1)
        assert torch.equal(together[:, 7:], activation(x[:, 7:]))
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, activation(x))
