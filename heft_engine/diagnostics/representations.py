"""The hidden states that stage 2 will meet, before stage 1 and after: rows (n, hidden), centred over the rows.

    spectrum         singular values of X
    effective rank   exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ (Roy and Vetterli, "The effective rank", EUSIPCO 2007)
    CKA              ‖YᵀX‖²_F / (‖XᵀX‖_F·‖YᵀY‖_F), 1 for the same up to rotation and scale (Kornblith et al., arXiv
                     1905.00414, eq. 4). Biased towards 1 where there are fewer rows than dimensions
    separability     how well a linear map tells the labels apart on rows it was not fitted on (linear probes, Alain
                     and Bengio, arXiv 1610.01644): ridge regression onto the labels in FOLDS folds, accuracy with its
                     95 % Wilson interval; and Fisher's tr(S_between)/tr(S_within), which needs no fit

It does NOT know models beyond their layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heft_engine.config.train import parse_positions
from heft_engine.data.encoding import Example, intervened_positions
from heft_engine.evaluation.evaluate import Evaluation
from heft_engine.inference.scoring import TOKEN_BUDGET
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack

FOLDS = 5
#: Ridge's λ, as a share of a centred row's mean squared length: the same for every model compared.
RIDGE = 0.1
TOLD = 256


@torch.inference_mode()
def states(lm: PackedLM, examples: Sequence[Example], layer: int, positions: str) -> Tensor:
    """The output of a layer at each row's last intervened prompt token, without interventions: (n, hidden), float32."""
    found = []
    for part in micro_batches(examples, TOKEN_BUDGET):
        batch = pack(part)
        ids, places = batch.input_ids.to(lm.device)[None], batch.position_ids.to(lm.device)[None]
        with lm.interventions.disabled():
            hidden = lm.run_layers(lm.embed(ids), places, batch.layout, 0, layer + 1)
        at = [
            row.start + intervened_positions(row.prompt, *parse_positions(positions))[-1]
            for row in batch.layout.rows
        ]
        found.append(hidden[0, torch.tensor(at, device=hidden.device)].float().cpu())
    return torch.cat(found)


def compare(before: Tensor, after: Tensor, labels: Sequence[int] | None) -> dict[str, Any]:
    """`labels` of the rows, counted from 0; None where rows share none."""
    return {
        "rows": len(before),
        "cka": cka(before, after),
        "before": describe(before, labels),
        "after": describe(after, labels),
    }


def describe(rows: Tensor, labels: Sequence[int] | None) -> dict[str, Any]:
    values = torch.linalg.svdvals(_centred(rows))
    return {
        "effective_rank": effective_rank(values),
        "singular_values": [float(f"{value:.6g}") for value in values[:TOLD].tolist()],
        "separability": separability(rows, labels) if labels is not None else None,
    }


def effective_rank(values: Tensor) -> float:
    """Of singular values: between 1 and their number."""
    shares = values.double() / values.double().sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of states of the same rows."""
    x, y = _centred(x), _centred(y)
    cross = torch.linalg.matrix_norm(y.T @ x).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def separability(rows: Tensor, labels: Sequence[int]) -> dict[str, Any] | None:
    """None where fewer than two labels have FOLDS rows each."""
    wanted = torch.tensor(labels)
    if len(torch.unique(wanted)) < 2 or torch.bincount(wanted)[torch.unique(wanted)].min() < FOLDS:
        return None
    right = _ridge_right(rows.double(), wanted)
    result = Evaluation.of(right)
    low, high = result.interval_95
    return {
        "probe_accuracy": result.accuracy,
        "probe_interval_95": [low, high],
        "majority": float(torch.bincount(wanted).max() / len(wanted)),
        "fisher": fisher(rows, wanted),
    }


def fisher(rows: Tensor, labels: Tensor) -> float:
    """tr(S_between)/tr(S_within)."""
    x = rows.double()
    middle = x.mean(0)
    between = within = 0.0
    for label in torch.unique(labels):
        own = x[labels == label]
        between += len(own) * float((own.mean(0) - middle).square().sum())
        within += float((own - own.mean(0)).square().sum())
    return between / within


def _ridge_right(x: Tensor, labels: Tensor) -> list[bool]:
    """Of each row, whether the map fitted without its fold gives its label. Folds are dealt out label by label."""
    order = torch.argsort(labels, stable=True)
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % FOLDS
    targets = torch.nn.functional.one_hot(labels).double()
    right = torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(FOLDS):
        fit, held = folds != fold, folds == fold
        middle, goal = x[fit].mean(0), targets[fit].mean(0)
        inside = x[fit] - middle
        # In the rows' own space: there are often fewer of them than dimensions.
        kernel = inside @ inside.T
        ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
        weights = inside.T @ torch.linalg.solve(kernel + ridge, targets[fit] - goal)
        guessed = ((x[held] - middle) @ weights + goal).argmax(1)
        right[held] = guessed == labels[held]
    return right.tolist()


def _centred(rows: Tensor) -> Tensor:
    return rows.double() - rows.double().mean(0)
