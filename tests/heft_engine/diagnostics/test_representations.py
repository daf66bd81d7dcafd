"""Measures of representations on cases whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import parse, yes_no
from probe_models import packed
from small_runs import text_rows
from torch import Tensor
from torch.testing import assert_close

from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.task import Task
from heft_engine.diagnostics.curvature import new_intervention
from heft_engine.diagnostics.representations import (
    cka,
    effective_rank,
    fisher,
    separability,
    states,
)
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packing import pack


def examples_of(path: Path, kind: str = "yes_no", count: int = 6) -> list[Example]:
    rows = parse(yes_no(count)) if kind == "yes_no" else text_rows(count)
    encoder = Encoder(load_tokenizer(path), Task.resolve(TaskSettings(), kind), 256)  # type: ignore[arg-type]
    return [example.supervised() for row in rows for example in encoder.encode(row)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cka_is_one_for_the_same_up_to_rotation_scale_and_shift() -> None:
    x = random(60, 12)
    turn, _ = torch.linalg.qr(random(12, 12, seed=1))
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, 3 * x @ turn + 7) == pytest.approx(1, abs=1e-5)
    assert cka(x, random(60, 12, seed=2)) < 0.5
    first, second = torch.zeros(4, 2), torch.zeros(4, 2)
    first[:2, 0], second[::2, 0] = 1, 1
    assert cka(first, second) == pytest.approx(0, abs=1e-12)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert 1 < effective_rank(torch.tensor([1.0, 0.1])) < 2


def test_separability_of_labels_that_differ_and_of_labels_that_do_not() -> None:
    labels = [i % 2 for i in range(80)]
    noise = random(80, 200)
    lifted = noise.clone()
    lifted[:, 0] += 20 * torch.tensor(labels)
    clear, blind = separability(lifted, labels), separability(noise, labels)
    assert clear is not None
    assert blind is not None
    assert clear["probe_accuracy"] == 1
    assert blind["probe_interval_95"][0] < 0.5 < blind["probe_interval_95"][1]
    assert clear["majority"] == 0.5
    assert separability(noise, [0] * 80) is None
    rows = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    assert fisher(rows, torch.tensor([0, 0, 1, 1])) == pytest.approx(100 / 4)


def test_states_are_those_of_the_layer_at_the_prompts_last_token(tiny_llama_dir: Path) -> None:
    lm, examples = packed(tiny_llama_dir), examples_of(tiny_llama_dir)
    lm.interventions.add(
        PlacedIntervention(layer=1, positions="l1", intervention=new_intervention("loreft", 32, 2, seed=0))
    )
    actual = states(lm, examples, 1, "l1")
    lm.interventions.clear()
    seen = []
    hook = lm.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    for example in examples:
        lm.hidden(pack([Example(prompt=example.prompt, answers=((),), labels=("",), gold=0)]))
    hook.remove()
    assert_close(actual, torch.stack([output[0, -1] for output in seen]), rtol=0, atol=1e-5)
