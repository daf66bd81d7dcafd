"""Calibration of label probabilities by temperature scaling: softmax(totals / T) with one T for a model.

Temperature scaling and the expected calibration error are those of Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, arXiv 1706.04599. T does not change which label has the highest total.
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
#: With fewer rows T is not fitted and stays 1: it would overfit them.
MIN_ROWS = 20
#: Validation rows that T is fitted on at most: they determine one scalar to about 5 %.
MAX_ROWS = 1_000
_LOG_BOUNDS = (math.log(0.05), math.log(50.0))

Array = NDArray[np.float64]
Method = Literal["held_out", "cross_fitted", "not_fitted"]


@dataclass(frozen=True, kw_only=True)
class LabelledScores:
    """Scores of rows whose right labels are known.

    totals: (rows, most labels of any row), log-probabilities; −inf where a row has fewer labels.
    gold: (rows,), the indices of the right labels.
    """

    totals: Array
    gold: NDArray[np.int64]

    @staticmethod
    def of(scores: Sequence[Scores], gold: Sequence[int | None]) -> LabelledScores:
        """Collects scores and right labels; skips rows without a right label or with scores that are not finite."""
        usable = [
            (row.totals, label)
            for row, label in zip(scores, gold, strict=True)
            if label is not None and all(map(math.isfinite, row.totals))
        ]
        totals = np.full((len(usable), max((len(row) for row, _ in usable), default=0)), -np.inf)
        for index, (row, _) in enumerate(usable):
            totals[index, : len(row)] = row
        return LabelledScores(totals=totals, gold=np.array([label for _, label in usable], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, mask: NDArray[np.bool_]) -> LabelledScores:
        return LabelledScores(totals=self.totals[mask], gold=self.gold[mask])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted temperature T, and metrics before and after on rows that it was not fitted on.

    fitted_rows: validation rows that T was fitted on; 0 if T stayed 1.
    n, split: the rows of the metrics.
    method: `held_out`: other rows than the fitted ones. `cross_fitted`: the fitted rows, each with the temperature
        fitted on the other four folds. `not_fitted`: too few validation rows, so T is 1.
    ece, nll: expected calibration error (15 equal bins) and mean negative log-likelihood of the right label (nats).
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


def calibrate(fitted: LabelledScores, reported: LabelledScores | None, split: str) -> Calibration | None:
    """Fits T on validation rows and measures it on `reported`, other rows; None: on the fitted rows, by cross-fitting.

    Returns None if there are no rows to measure on.
    """
    rows = fitted if reported is None else reported
    if not len(rows):
        return None
    before = np.ones(len(rows))
    temperature, after, method = 1.0, before, "not_fitted"
    if len(fitted) >= MIN_ROWS:
        temperature = fit_temperature(fitted)
        method = "cross_fitted" if reported is None else "held_out"
        after = cross_fit(fitted) if reported is None else np.full(len(rows), temperature)
    return Calibration(
        temperature=temperature,
        fitted_rows=len(fitted) if method != "not_fitted" else 0,
        n=len(rows),
        split=split,
        method=method,  # type: ignore[arg-type]
        ece_before=expected_calibration_error(rows, before),
        ece_after=expected_calibration_error(rows, after),
        nll_before=negative_log_likelihood(rows, before),
        nll_after=negative_log_likelihood(rows, after),
    )


def fit_temperature(rows: LabelledScores) -> float:
    """Returns the T with the least cross-entropy to smoothed right labels.

    As in Platt scaling (1999), a share of 1 / (n + 2) of each target goes to the other labels. Without it, T would go
    to 0 where all of the n rows are right, which claims more certainty than n rows support.
    """
    is_label = np.isfinite(rows.totals)
    smoothing = 1 / (len(rows) + 2)
    targets = np.where(is_label, smoothing / (is_label.sum(axis=1, keepdims=True) - 1), 0.0)
    targets[np.arange(len(rows)), rows.gold] = 1 - smoothing

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(rows.totals / math.exp(log_temperature), axis=1)
        return -float(np.sum(targets * np.where(is_label, log_probabilities, 0.0)) / len(rows))

    # Convex in 1 / T, so there is one minimum between the bounds.
    return math.exp(float(minimize_scalar(loss, bounds=_LOG_BOUNDS, method="bounded").x))


def cross_fit(rows: LabelledScores) -> Array:
    """Returns for each row the T that is fitted on the rows outside its fold: (rows,)."""
    # Permuted, because a file's rows may be sorted by label.
    folds = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    temperatures = np.ones(len(rows))
    for fold in range(FOLDS):
        temperatures[folds == fold] = fit_temperature(rows[folds != fold])
    return temperatures


def expected_calibration_error(rows: LabelledScores, temperatures: Array) -> float:
    """Σ over bins of |B| / n · |accuracy(B) − mean confidence(B)| (Guo et al., equation 3; Naeini et al. 2015).

    A row's confidence is its highest probability; bin m of 15 has those in ((m − 1) / 15, m / 15].
    """
    confidence = np.exp(_log_probabilities(rows, temperatures).max(axis=1))
    correct = rows.totals.argmax(axis=1) == rows.gold
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(rows))


def negative_log_likelihood(rows: LabelledScores, temperatures: Array) -> float:
    """Mean over the rows, in nats."""
    gold = _log_probabilities(rows, temperatures)[np.arange(len(rows)), rows.gold]
    return -float(gold.mean())


def _log_probabilities(rows: LabelledScores, temperatures: Array) -> Array:
    log_probabilities: Array = log_softmax(rows.totals / temperatures[:, None], axis=1)
    return log_probabilities
