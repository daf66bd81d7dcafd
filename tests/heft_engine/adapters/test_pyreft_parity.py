"""LoReFT against the real pyreft, on float32 bases: the same weights give the same outputs, logits and losses."""

import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch
from real_pyreft import answer_logits, copy_raw, interventions, packed, padded, plain, reft_model, train_steps
from small_runs import (
    load_inputs,
    put_interventions,
    reft,
    step_losses,
    steps_of,
    text_rows,
    train_inputs,
    yes_no_rows,
)
from torch.testing import assert_close

from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.data.encoding import Example
from heft_engine.data.rows import Row
from heft_engine.events import Event
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import pack

MakeTinyModel = Callable[[str], Path]
#: The float32 error of padding, a dummy token and other shapes of the same products.
CLOSE = 2e-5


def random_examples(lengths: list[int], answer_tokens: int) -> list[Example]:
    """One example for each prompt length; ids lie above the special tokens."""
    chance = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(10, 590) for _ in range(count))

    return [
        Example(prompt=tokens(length), answers=(tokens(answer_tokens),), labels=("answer",), gold=0)
        for length in lengths
    ]


def packed_logits(lm: PackedLM, examples: list[Example], scale: float = 1.0) -> torch.Tensor:
    batch = pack(examples, scale=scale)
    with torch.no_grad():
        return lm.logits(lm.hidden(batch)[batch.supervised()[0]])


def test_an_intervention_has_the_bits_of_pyrefts(tiny_llama_dir: Path) -> None:
    (theirs,) = interventions(reft_model(plain(tiny_llama_dir), [1], rank=4))
    ours = LoreftIntervention(32, 4)
    copy_raw(ours, theirs)
    hidden = torch.randn(7, 32)
    assert torch.equal(ours(hidden), theirs(hidden))
    assert not torch.allclose(ours(hidden), hidden, atol=0.1)


def test_a_baked_intervention_has_the_bits_of_pyrefts(tiny_llama_dir: Path) -> None:
    (theirs,) = interventions(reft_model(plain(tiny_llama_dir), [1], rank=4))
    ours = LoreftIntervention(32, 4)
    ours.load_exported_state(theirs.state_dict())
    hidden = torch.randn(7, 32)
    assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("positions", ["l1", "f1+l1", "l3", "f4+l3"])
@pytest.mark.parametrize("answer_tokens", [1, 3])
def test_packed_rows_get_the_logits_of_pyrefts_padded_batch(
    tiny_llama_dir: Path, positions: str, answer_tokens: int
) -> None:
    # One and two tokens are below what some of these positions ask for: pyreft's clamp.
    examples = random_examples([9, 1, 24, 2, 5, 3, 40], answer_tokens)
    lm, theirs = packed(tiny_llama_dir), reft_model(plain(tiny_llama_dir), [1, 2], rank=4)
    before = packed_logits(lm, examples)
    for ours, their in zip(
        put_interventions(lm, reft(layers=[1, 2], positions=positions)), interventions(theirs), strict=True
    ):
        copy_raw(ours, their)

    expected = answer_logits(theirs, padded(examples, [positions] * 2))
    assert_close(packed_logits(lm, examples), expected, rtol=0, atol=CLOSE)
    assert (packed_logits(lm, examples) - before).abs().max() > 0.1
    assert torch.equal(packed_logits(lm, examples, scale=0.0), before)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma", "gemma2", "gpt_neox"])
def test_each_family_that_pyvene_knows_gets_pyrefts_logits(
    make_tiny_model: MakeTinyModel, family: str
) -> None:
    # Longer than the tiny models' windows of 16 tokens.
    examples = random_examples([30, 6, 19], answer_tokens=2)
    path = make_tiny_model(family)
    lm, theirs = packed(path), reft_model(plain(path), [2], rank=4)
    (ours,) = put_interventions(lm, reft(positions="f1+l1"))
    copy_raw(ours, interventions(theirs)[0])
    expected = answer_logits(theirs, padded(examples, ["f1+l1"]))
    assert_close(packed_logits(lm, examples), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("rows", "positions", "layers"),
    [(yes_no_rows(16), "l1", [2]), (text_rows(16), "f1+l1", [1, 2]), (text_rows(16), "f4+l3", [0])],
)
def test_twenty_steps_have_the_losses_of_pyrefts_trainer(
    tiny_llama_dir: Path, tmp_path: Path, rows: list[Row], positions: str, layers: list[int]
) -> None:
    stage = reft(layers=layers, positions=positions)
    events: list[Event] = []
    inputs = load_inputs(tiny_llama_dir, [stage], rows)
    ours = put_interventions(inputs.lm, stage)
    theirs = reft_model(plain(tiny_llama_dir), layers, rank=4)
    for mine, their in zip(ours, interventions(theirs), strict=True):
        copy_raw(mine, their)

    batches = [padded(examples, [positions] * len(layers)) for examples in steps_of(inputs)]
    expected = train_steps(theirs, batches, learning_rate=1e-2)
    train_inputs(inputs, tmp_path / "bundle", events.append)

    losses = step_losses(events)
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=CLOSE)
    assert fmean(losses[-4:]) < fmean(losses[:4]) - 0.1
    for mine, their in zip(ours, interventions(theirs), strict=True):
        assert_close(mine.rotation, their.rotate_layer.weight.detach(), rtol=0, atol=1e-4)
