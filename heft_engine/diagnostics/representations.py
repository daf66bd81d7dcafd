"""Hidden states at the intervened position of stage 2, before and after stage 1: (n, hidden), centred over the rows.

spectrum         singular values of X
effective rank   exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ (Roy and Vetterli, "The effective rank", EUSIPCO 2007)
CKA              ‖YᵀX‖²_F / (‖XᵀX‖_F·‖YᵀY‖_F), 1 if equal up to rotation and scale (Kornblith et al., arXiv
                 1905.00414, eq. 4). Biased towards 1 with fewer rows than dimensions
separability     accuracy of a linear probe (Alain and Bengio, arXiv 1610.01644): ridge regression onto the labels,
                 cross-validated in FOLDS folds, with its 95 % Wilson interval; and Fisher's
                 tr(S_between)/tr(S_within), which needs no fit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heft_engine.config.train import parse_positions
from heft_engine.data.encoding import Example, intervened_positions
from heft_engine.evaluation.evaluate import Evaluation
from heft_engine.inference.partition import TOKEN_BUDGET
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches, pack

FOLDS = 5
#: Ridge's λ, relative to the mean squared norm of a centred row, so that it is comparable between models.
RIDGE = 0.1
#: Singular values that are reported.
MAX_SINGULAR_VALUES = 256


@torch.inference_mode()
def states(lm: PackedLM, examples: Sequence[Example], layer: int, positions: str) -> Tensor:
    """Returns a layer's output at each row's last intervened token, without interventions: (n, hidden), float32."""
    outputs = []
    for micro_batch in micro_batches(examples, TOKEN_BUDGET):
        batch = pack(micro_batch)
        ids, position_ids = batch.inputs(lm.device)
        with lm.interventions.disabled():
            hidden = lm.run_layers(lm.embed(ids), position_ids, batch.layout, 0, layer + 1)
        at = [
            row.start + intervened_positions(row.prompt, *parse_positions(positions))[-1]
            for row in batch.layout.rows
        ]
        outputs.append(hidden[0, torch.tensor(at, device=hidden.device)].float().cpu())
    return torch.cat(outputs)


def compare(before: Tensor, after: Tensor, labels: Sequence[int] | None) -> dict[str, Any]:
    """Compares states of the same rows. `labels`: indices of the rows' labels; None if rows have their own choices."""
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
        "singular_values": [float(f"{value:.6g}") for value in values[:MAX_SINGULAR_VALUES].tolist()],
        "separability": separability(rows, labels) if labels is not None else None,
    }


def effective_rank(values: Tensor) -> float:
    """The effective rank of a matrix with these singular values: between 1 and their number."""
    shares = values.double() / values.double().sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of states of the same rows."""
    x, y = _centred(x), _centred(y)
    cross = torch.linalg.matrix_norm(y.T @ x).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))


def separability(rows: Tensor, labels: Sequence[int]) -> dict[str, Any] | None:
    """Returns None unless there are two labels or more, with at least FOLDS rows each."""
    targets = torch.tensor(labels)
    counts = torch.bincount(targets)
    if (counts > 0).sum() < 2 or counts[counts > 0].min() < FOLDS:
        return None
    result = Evaluation.of(_probe_correct(rows.double(), targets))
    return {
        "probe_accuracy": result.accuracy,
        "probe_interval_95": list(result.interval_95),
        "majority": float(counts.max() / len(targets)),
        "fisher": fisher(rows, targets),
    }


def fisher(rows: Tensor, labels: Tensor) -> float:
    """tr(S_between)/tr(S_within)."""
    x = rows.double()
    mean = x.mean(0)
    between = within = 0.0
    for label in torch.unique(labels):
        members = x[labels == label]
        between += len(members) * float((members.mean(0) - mean).square().sum())
        within += float((members - members.mean(0)).square().sum())
    return between / within


def _probe_correct(x: Tensor, labels: Tensor) -> list[bool]:
    """Returns for each row whether the probe fitted without its fold predicts its label. Folds are stratified."""
    order = torch.argsort(labels, stable=True)
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % FOLDS
    targets = torch.nn.functional.one_hot(labels).double()
    correct = torch.zeros(len(labels), dtype=torch.bool)
    for fold in range(FOLDS):
        is_fitted, is_tested = folds != fold, folds == fold
        mean, target_mean = x[is_fitted].mean(0), targets[is_fitted].mean(0)
        centred = x[is_fitted] - mean
        # The dual problem: there are often fewer rows than dimensions.
        kernel = centred @ centred.T
        ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
        weights = centred.T @ torch.linalg.solve(kernel + ridge, targets[is_fitted] - target_mean)
        predicted = ((x[is_tested] - mean) @ weights + target_mean).argmax(1)
        correct[is_tested] = predicted == labels[is_tested]
    return correct.tolist()


def _centred(rows: Tensor) -> Tensor:
    return rows.double() - rows.double().mean(0)
