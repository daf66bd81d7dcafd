"""Probabilities that mean what they say: one temperature T, so that softmax(totals / T) is right as often as it claims.

Temperature scaling and the expected calibration error are those of Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, arXiv 1706.04599. T never changes which label has the highest total. It does NOT know models,
rows or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from heft_engine.inference.scoring import Scores

BINS = 15
FOLDS = 5
#: With fewer rows, T would say more about them than about the model: it stays 1.
LEAST_ROWS = 20
#: So many rows leave one scalar uncertain by some 5 %; scoring more of them would only take time.
MOST_ROWS = 1_000
_LOG_BOUNDS = (math.log(0.05), math.log(50.0))

Totals = NDArray[np.float64]
Method = Literal["held_out", "cross_fitted", "not_fitted"]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Scored rows whose right labels are known.

    totals: (rows, labels of the row that has most); −inf where a row has no such label.
    gold: (rows,), the right label's index.
    """

    totals: Totals
    gold: NDArray[np.int64]

    @staticmethod
    def of(scores: Sequence[Scores], gold: Sequence[int | None]) -> Labelled:
        """Rows without an answer, and those whose scores are no numbers, are left out."""
        kept = [
            (one.totals, right)
            for one, right in zip(scores, gold, strict=True)
            if right is not None and all(map(math.isfinite, one.totals))
        ]
        totals = np.full((len(kept), max((len(row) for row, _ in kept), default=0)), -np.inf)
        for index, (row, _) in enumerate(kept):
            totals[index, : len(row)] = row
        return Labelled(totals=totals, gold=np.array([right for _, right in kept], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.gold)

    def where(self, mask: NDArray[np.bool_]) -> Labelled:
        return Labelled(totals=self.totals[mask], gold=self.gold[mask])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """T, and what it does to the probabilities of rows that it was not fitted on.

    fitted_rows: validation rows that T was fitted on; 0 where T stayed 1.
    n, split: the rows that the figures were measured on.
    method: `held_out`: those rows are not the fitted ones. `cross_fitted`: they are, but each one's "after" has the
        temperature of the other four fifths. `not_fitted`: too few validation rows, and T is 1.
    ece, nll: expected calibration error (15 equal bins) and mean negative log-probability of the right label (nats).
    """

    temperature: float
    fitted_rows: int
    n: int
    split: str
    method: Method
    bins: int = BINS
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(fitted: Labelled, reported: Labelled | None, split: str) -> Calibration | None:
    """Fits T on validation rows and measures it on `reported`, other rows; None: on the fitted rows, by cross-fitting.

    None where there is no row to measure on.
    """
    measured = fitted if reported is None else reported
    if not len(measured):
        return None
    temperature, after, method = 1.0, np.ones(len(measured)), "not_fitted"
    if len(fitted) >= LEAST_ROWS:
        temperature = fit_temperature(fitted)
        method = "cross_fitted" if reported is None else "held_out"
        after = cross_fitted(fitted) if reported is None else np.full(len(measured), temperature)
    before = np.ones(len(measured))
    return Calibration(
        temperature=temperature,
        fitted_rows=len(fitted) if method != "not_fitted" else 0,
        n=len(measured),
        split=split,
        method=method,  # type: ignore[arg-type]
        ece_before=expected_calibration_error(measured, before),
        ece_after=expected_calibration_error(measured, after),
        nll_before=negative_log_likelihood(measured, before),
        nll_after=negative_log_likelihood(measured, after),
    )


def fit_temperature(rows: Labelled) -> float:
    """The T with the least cross-entropy to the right labels.

    As in Platt's scaling (1999), of n rows a part of 1 / (n + 2) counts for the other labels: where all rows are right
    (or nearly), the bare likelihood would drive T towards 0 and claim certainty that n rows can't show.
    """
    labels = np.isfinite(rows.totals)
    doubt = 1 / (len(rows) + 2)
    targets = np.where(labels, doubt / (labels.sum(axis=1, keepdims=True) - 1), 0.0)
    targets[np.arange(len(rows)), rows.gold] = 1 - doubt

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(rows.totals / math.exp(log_temperature), axis=1)
        return -float(np.sum(targets * np.where(labels, log_probabilities, 0.0)) / len(rows))

    # Convex in 1 / T, so there is one minimum between the bounds.
    return math.exp(float(minimize_scalar(loss, bounds=_LOG_BOUNDS, method="bounded").x))


def cross_fitted(rows: Labelled) -> Totals:
    """(rows,): for each row the T that the rows outside its fifth give."""
    # Rows may stand sorted by label in their file.
    folds = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    temperatures = np.ones(len(rows))
    for fold in range(FOLDS):
        temperatures[folds == fold] = fit_temperature(rows.where(folds != fold))
    return temperatures


def expected_calibration_error(rows: Labelled, temperatures: Totals) -> float:
    """Σ over bins of |B| / n · |accuracy(B) − mean confidence(B)| (Guo et al., equation 3; Naeini et al. 2015).

    A row's confidence is its highest probability; bin m of 15 holds those in ((m − 1) / 15, m / 15].
    """
    confidence = np.exp(_log_probabilities(rows, temperatures).max(axis=1))
    right = rows.totals.argmax(axis=1) == rows.gold
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(rows))


def negative_log_likelihood(rows: Labelled, temperatures: Totals) -> float:
    """Nats a row."""
    chosen = _log_probabilities(rows, temperatures)[np.arange(len(rows)), rows.gold]
    return -float(chosen.mean())


def _log_probabilities(rows: Labelled, temperatures: Totals) -> Totals:
    found: Totals = log_softmax(rows.totals / temperatures[:, None], axis=1)
    return found
