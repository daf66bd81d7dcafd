"""Lanczos, Gauss-Newton curvature and descent on cases whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import parse, yes_no
from probe_models import packed
from small_runs import text_rows
from torch import Tensor
from torch.testing import assert_close

from heft_engine.adapters.reft import KINDS
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.task import Task
from heft_engine.diagnostics import descent
from heft_engine.diagnostics.curvature import GaussNewton, InitialIntervention, curvature, new_intervention
from heft_engine.diagnostics.eigen import hutchinson, lanczos
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packing import pack
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import FullPass, summed_loss


def examples_of(path: Path, kind: str = "yes_no", count: int = 6) -> list[Example]:
    rows = parse(yes_no(count)) if kind == "yes_no" else text_rows(count)
    encoder = Encoder(load_tokenizer(path), Task.resolve(TaskSettings(), kind), 256)  # type: ignore[arg-type]
    return [example.supervised() for row in rows for example in encoder.encode(row)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- eigenvalues ---------------------------------------------------------------------------------------------


def test_lanczos_and_hutchinson_agree_with_a_dense_matrix() -> None:
    factor = random(40, 25).double()
    matrix = factor @ factor.T
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    ritz = lanczos(lambda v: matrix @ v.double(), random(40, seed=1), 40)
    assert_close(torch.tensor(ritz.values[:20], dtype=torch.float64), exact[:20], rtol=1e-6, atol=1e-6)
    early = lanczos(lambda v: matrix @ v.double(), random(40, seed=1), 8)
    assert float((exact - early.values[0]).abs().min()) <= early.error
    assert early.values[0] < float(exact[0])
    trace = hutchinson(lambda v: matrix @ v.double(), 40, 400, torch.Generator().manual_seed(0))
    assert abs(trace.value - float(matrix.trace())) < 4 * trace.standard_error
    assert trace.standard_error < 0.05 * trace.value


def test_lanczos_ends_where_the_space_does() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 3.0, 1.0], dtype=torch.float64))
    ritz = lanczos(lambda v: matrix @ v, torch.ones(4), 10)
    assert ritz.values == pytest.approx([3.0, 1.0])
    assert ritz.error == pytest.approx(0, abs=1e-6)


# -- curvature -----------------------------------------------------------------------------------------------


def dense(matrix: GaussNewton) -> Tensor:
    """JᵀHJ in the flat parameters, by whole Jacobians, between dense projections onto the tangent space."""
    names = list(matrix.parameters)
    total = torch.zeros(matrix.size, matrix.size, dtype=torch.float64)
    for logits in matrix.logits():
        jacobians = torch.func.jacrev(logits)(matrix.parameters)
        z = logits(matrix.parameters)
        j = torch.cat([jacobians[n].reshape(*z.shape, -1) for n in names], dim=-1).double()
        p = torch.softmax(z.double(), -1)
        for row in range(len(z)):
            h = torch.diag(p[row]) - torch.outer(p[row], p[row])
            total += j[row].T @ h @ j[row]
    projector = torch.eye(matrix.size, dtype=torch.float64)
    if "rotate_layer" in names:
        q = matrix.parameters["rotate_layer"].double()
        at = sum(matrix.parameters[n].numel() for n in names[: names.index("rotate_layer")])
        for index in range(q.numel()):
            unit = torch.zeros(q.numel(), dtype=torch.float64)
            unit[index] = 1
            inner = q.T @ unit.view_as(q)
            column = (unit.view_as(q) - q @ (inner + inner.T) / 2).reshape(-1)
            projector[at : at + q.numel(), at + index] = column
    return projector @ (total / matrix.tokens) @ projector


@pytest.mark.parametrize(
    ("family", "task", "kind", "positions"),
    [
        ("llama", "yes_no", "loreft", "l1"),
        ("llama", "text", "loreft", "f1+l1"),
        pytest.param("gemma2", "yes_no", "noreft", "l2", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "text", "direft", "l1", marks=pytest.mark.slow),
    ],
)
def test_the_eigenvalues_are_those_of_a_dense_gauss_newton_matrix(
    make_tiny_model: Any, family: str, task: str, kind: str, positions: str
) -> None:
    path = make_tiny_model(family)
    lm, examples = packed(path), examples_of(path, task, 5 if task == "yes_no" else 2)
    initial = InitialIntervention(
        layer=1, positions=positions, intervention=new_intervention(kind, lm.hidden_size, 2, seed=0)
    )
    matrix = GaussNewton(initial.cache(lm, examples), initial)
    exact = dense(matrix)
    values = torch.linalg.eigvalsh(exact).flip(0)
    report = curvature(lm, initial, examples, seed=0, steps=30, probes=50)
    assert report["largest"] == pytest.approx(float(values[0]), rel=1e-3)
    assert report["ritz_values"][:3] == pytest.approx(values[:3].tolist(), rel=1e-3)
    assert abs(report["trace"] - float(exact.trace())) < 5 * report["trace_standard_error"]
    assert report["trace_over_largest"] == pytest.approx(report["trace"] / report["largest"])
    assert report["tokens"] == sum(example.supervised_tokens for example in examples)
    vector = random(matrix.size, seed=3)
    assert_close(matrix.product(vector).double(), exact @ vector.double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_differentiates_the_model_with_its_intervention(tiny_llama_dir: Path, kind: str) -> None:
    lm, examples = packed(tiny_llama_dir), examples_of(tiny_llama_dir, "text")
    initial = InitialIntervention(
        layer=1, positions="f1+l2", intervention=new_intervention(kind, 32, 2, seed=0)
    )
    matrix = GaussNewton(initial.cache(lm, examples), initial)
    lm.interventions.add(PlacedIntervention(layer=1, positions="f1+l2", intervention=initial.intervention))
    batch = pack(examples)
    with torch.no_grad():
        expected = lm.logits(lm.hidden(batch)[batch.supervised()[0]])
    lm.interventions.clear()
    logits = torch.cat([part(matrix.parameters) for part in matrix.logits()])
    assert_close(logits, expected, rtol=0, atol=2e-5)


def test_a_beginning_is_the_same_in_every_model_and_disturbs_no_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = new_intervention("loreft", 32, 4, seed=3), new_intervention("loreft", 32, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first.export_state()[n], t) for n, t in second.export_state().items())
    assert not torch.equal(first.rotation, new_intervention("loreft", 32, 4, seed=4).rotation)


def test_descent_is_of_the_models_own_loss_and_leaves_the_beginning(tiny_llama_dir: Path) -> None:
    lm, examples = packed(tiny_llama_dir), examples_of(tiny_llama_dir)
    initial = InitialIntervention(
        layer=1, positions="l1", intervention=new_intervention("loreft", 32, 2, seed=0)
    )
    state = initial.intervention.export_state()
    curve = descent.descend(lm, initial, examples, rate=1e-2, steps=12)
    assert len(curve) == 13
    assert curve[-1] < curve[0] - 0.05
    assert all(torch.equal(initial.intervention.export_state()[n], t) for n, t in state.items())
    assert list(lm.interventions) == []
    lm.interventions.add(PlacedIntervention(layer=1, positions="l1", intervention=initial.intervention))
    with torch.no_grad():
        plain = summed_loss(FullPass(lm=lm, examples=examples), SupervisedObjective(), range(len(examples)))
    assert curve[0] == pytest.approx(float(plain) / len(examples), abs=1e-5)


def test_steps_to_a_loss() -> None:
    comparison = descent.compare([3.0, 2.0, 1.5, 1.2], [2.5, 1.4, 1.0, 0.9])
    assert (comparison["target"], comparison["steps_before"], comparison["steps_after"]) == (1.2, 3, 2)
    assert descent.compare([3.0, 2.0], [2.5, 1.4], target=1.5)["steps_before"] is None
