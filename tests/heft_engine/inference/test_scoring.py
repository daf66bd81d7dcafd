"""Scores: what they are, and that a row's bits don't depend on what it is scored with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from probe_models import with_intervention
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from heft_engine.data.encoding import Example
from heft_engine.inference import scoring
from heft_engine.inference.scoring import Scores, score
from heft_engine.model import attention, batch_invariant, block_sizes
from heft_engine.model.batch_invariant import FixedShapes
from heft_engine.model.block_sizes import HEIGHTS, measured
from heft_engine.model.packed_lm import PackedLM

#: What torch computes: tests of layers on AMX have a file of their own.
pytestmark = pytest.mark.usefixtures("without_amx")

MakeModel = Callable[[str], Path]


def packed(path: Path, dtype: torch.dtype = torch.float32) -> PackedLM:
    """With an intervention at the last prompt token: one row alone gives it a product of one row."""
    return with_intervention(path, "l1", dtype)


def questions(n: int) -> list[Example]:
    """Prompts of 2 to 90 tokens, single labels and longer choices mixed."""
    chance = random.Random(0)
    examples = []
    for index in range(n):
        prompt = tuple(chance.randrange(5, 600) for _ in range(chance.randint(2, 90)))
        choices = ((7,), (8,)) if index % 3 else ((7, 9, 11), (8,), (30, 31) * 9)
        labels = tuple(map(str, range(len(choices))))
        examples.append(Example(prompt=prompt, answers=choices, labels=labels, gold=0))
    return examples


def totals(lm: PackedLM, examples: list[Example]) -> list[tuple[float, ...]]:
    return [one.totals for one in score(lm, examples)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(
    make_tiny_model: MakeModel, family: str, threads: int, dtype: torch.dtype
) -> None:
    """Alone, with all others, in another order, in another number. Three threads cut work at odd places."""
    torch.set_num_threads(threads)
    lm, examples = packed(make_tiny_model(family), dtype), questions(24)
    alone = [totals(lm, [example])[0] for example in examples]
    assert len(set(alone)) == len(examples)
    assert totals(lm, examples) == alone
    assert totals(lm, examples[::-1]) == alone[::-1]
    assert totals(lm, examples[3:20]) == alone[3:20]
    assert totals(lm, examples * 3) == alone * 3


def test_many_passes_say_what_one_says(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, examples = packed(tiny_llama_dir), questions(30)
    whole = totals(lm, examples)
    monkeypatch.setattr(scoring, "TOKEN_BUDGET", 100)
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

    for example, one in zip(questions(9), score(lm, questions(9)), strict=True):
        exact = [log_probability(example.prompt, answer) for answer in example.answers]
        if max(map(len, example.answers)) == 1:  # up to a constant
            offset = one.totals[0] - exact[0]
            exact = [value + offset for value in exact]
        assert one.totals == pytest.approx(exact, abs=1e-4)
        lengths = map(len, example.answers)
        assert one.means == tuple(total / n for total, n in zip(one.totals, lengths, strict=True))


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


def test_only_masks_that_take_little_are_kept(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window every row that is longer has a mask of its own, as many entries as its length squared."""
    lm = packed(make_tiny_model("mistral"))
    made: list[tuple[int, ...]] = []
    seen = attention._seen

    def watched(lengths: tuple[int, ...], *where: Any) -> torch.Tensor:
        made.append(lengths)
        return seen(lengths, *where)

    monkeypatch.setattr(attention, "_seen", watched)
    monkeypatch.setattr(attention, "_MOST_KEPT", 90 * 90)
    score(lm, long_rows(70, 90))
    once = [lengths for lengths in made if lengths in ((70,), (90,))]
    assert sorted(once) == [(70,), (90,)], "one for every length, whatever the layer"
    made.clear()
    score(lm, long_rows(92, 100))
    assert len([lengths for lengths in made if lengths == (100,)]) == lm.n_layers


def test_a_pass_ends_on_a_whole_block(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every product would copy its rows to pad them."""
    lm, padded = packed(tiny_llama_dir), []
    lm.leave_shapes_unmeasured()
    monkeypatch.setattr(batch_invariant.F, "pad", lambda *rows: padded.append(rows) or F.pad(*rows))
    lm.interventions.clear()
    score(lm, long_rows(3, 41, 50))
    assert not padded


def test_unmeasured_blocks_give_bits_that_depend_on_no_neighbour(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    measured = totals(lm, questions(12))
    lm.leave_shapes_unmeasured()
    assert not lm.fixed_shapes().heights
    unmeasured = totals(lm, questions(12))
    assert [totals(lm, [question])[0] for question in questions(12)] == unmeasured
    for mine, theirs in zip(unmeasured, measured, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


# -- fixed shapes


SHAPE = (64, 48, torch.float32)


def calibrated(layer: nn.Module) -> FixedShapes:
    return measured([layer], torch.device("cpu"))[torch.get_num_threads()]


@pytest.mark.parametrize("heights", [None, {32: 1.0, 512: 4.0}, {32: 1.0, 64: 1.5, 1_024: 8.0}])
def test_a_plan_covers_every_row_in_the_least_time(heights: dict[int, float] | None) -> None:
    mode = FixedShapes(32, {SHAPE: heights} if heights else None)
    for rows in [*range(1, 200), 511, 512, 513, 700, 1_024, 3_000, 4_096]:
        plan = mode.plan(SHAPE, rows)
        assert sum(plan[:-1]) < rows <= sum(plan)
        assert set(plan) <= set(heights or {32: 0})
        seconds = sum((heights or {32: 1.0})[height] for height in plan)
        assert seconds <= -(-rows // 32)
        if heights and 512 in heights:
            wholes, left = divmod(-(-rows // 32), 16)
            assert seconds == min(4.0 * wholes + left, 4.0 * (wholes + 1))
    assert mode.plan(SHAPE, 0) == ()
    assert mode.plan((1, 2, torch.float32), 100) == (32,) * 4


def test_few_rows_need_no_padding_where_that_was_seen_to_change_nothing() -> None:
    mode = FixedShapes(32, {SHAPE: {32: 1.0}}, {SHAPE: (3, 24)})
    plans = {3: (3,), 1: (3,), 4: (24,), 25: (32,), 32: (32,), 35: (32, 32)}
    assert {rows: mode.plan(SHAPE, rows) for rows in plans} == plans
    torch.manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):
        layer = nn.Linear(192, 64, bias=False, dtype=dtype).requires_grad_(False)
        shapes = calibrated(layer)
        rows = torch.randn(32, 192, dtype=dtype)
        whole = layer(rows)
        for few in shapes.steps.fewer[64, 192, dtype]:
            assert torch.equal(layer(rows[:few]), whole[:few])


@torch.inference_mode()
def test_products_in_blocks_are_the_same_products() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64)
    for mode in (FixedShapes(32, {SHAPE: {32: 1.0, 512: 2.0}}), FixedShapes(32)):
        for rows in (1, 31, 32, 33, 200, 700):
            x = torch.randn(2, rows, 48)
            with mode:
                blocks = layer(x)
            torch.testing.assert_close(blocks, layer(x), atol=1e-5, rtol=0)
            with mode:
                assert torch.equal(layer(x[1:, -1:]), blocks[1:, -1:])


@pytest.mark.parametrize("activation", [F.silu, lambda x: F.gelu(x, approximate="tanh")])
@pytest.mark.parametrize("width", [64, 100, 1_536])
def test_an_activations_bits_do_not_depend_on_where_a_row_lies(activation: Any, width: int) -> None:
    torch.set_num_threads(3)
    torch.manual_seed(0)
    x = torch.randn(1, 300, width)
    with FixedShapes(32):
        together = activation(x)
        alone = torch.cat([activation(x[:, i : i + 1]) for i in range(300)], dim=1)
        assert torch.equal(together[:, 7:], activation(x[:, 7:]))
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, activation(x))


#: Which heights give the same bits: here all, or the largest with the smallest, or the largest with none of them.
FAMILIES = {
    "all": (lambda height: 0, list(HEIGHTS)),
    "in-between": (lambda height: 64 <= height <= 512, [h for h in HEIGHTS if 64 <= h <= 512]),
    "all-but-two": (lambda height: height in (64, 96), [h for h in HEIGHTS if h not in (64, 96)]),
    "from-256-on": (lambda height: height if height < 256 else 0, [h for h in HEIGHTS if h >= 256]),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_calibration_takes_a_family_of_heights_that_give_the_same_bits(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    bits, wanted = FAMILIES[family]

    def in_blocks(weight: Any, height: int, packed: bool) -> Tensor:
        return torch.full((len(weight.rows) // height * height, 2), float(bits(height)))

    monkeypatch.setattr(block_sizes, "_in_blocks", in_blocks)
    lm = packed(tiny_llama_dir)
    mode = measured(lm.layers, lm.device)[torch.get_num_threads()]
    # q and o, k and v, gate and up, down: one product each.
    assert mode.heights.keys() == {(*s, torch.float32) for s in [(32, 32), (16, 32), (64, 32), (32, 64)]}
    for heights in mode.heights.values():
        assert list(heights) == wanted
        least = min(heights)
        assert all(0 < took <= -(-height // least) * heights[least] for height, took in heights.items())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_passes_of_every_length(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(192, 320, bias=False, dtype=dtype)
    mode = calibrated(layer)
    x = torch.randn(2_100, 192, dtype=dtype)
    with mode:
        whole = layer(x)
        for rows in (1, 5, 32, 33, 64, 100, 300, 700, 1_300):
            assert torch.equal(layer(x[:rows]), whole[:rows]), rows
            assert torch.equal(layer(x[77 : 77 + rows]), whole[77 : 77 + rows]), rows


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 96, 500])
def test_a_pass_is_filled_up_to_what_blocks_cover(rows: int) -> None:
    mode = FixedShapes(32, {SHAPE: {64: 1.0, 96: 1.0, 512: 1.0}})
    whole = mode.whole(rows)
    assert rows <= whole < max(65, rows + 32)
    assert sum(FixedShapes(32, {SHAPE: {64: 2.0, 96: 3.0}}).plan(SHAPE, whole)) == whole


def test_steps_of_writing_have_blocks_of_their_own(tiny_llama_dir: Path) -> None:
    shapes = packed(tiny_llama_dir).fixed_shapes()
    assert shapes.steps is not shapes
    assert not shapes.steps.heights
    assert shapes.steps.plan((64, 32, torch.float32), 33) == (32, 32)
    assert FixedShapes(32).steps.unit == 32


def test_calibration_is_made_anew_for_another_number_of_threads(tiny_llama_dir: Path) -> None:
    torch.set_num_threads(1)
    lm = packed(tiny_llama_dir)
    first = lm.fixed_shapes()
    assert lm.fixed_shapes() is first
    torch.set_num_threads(2)
    assert lm.fixed_shapes() is not first
