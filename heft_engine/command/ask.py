"""`evaluate` and `predict`: a bundle asked from a shell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from heft_engine.calibration import Labelled, expected_calibration_error, negative_log_likelihood
from heft_engine.encoding import Example
from heft_engine.errors import ConfigError, RowError
from heft_engine.evaluation import Evaluation
from heft_engine.evaluation import evaluate as evaluate_examples
from heft_engine.predictor import Predictor, load
from heft_engine.rows import Row, parse_row, read_rows

#: Rows answered together; enough to fill a forward pass.
BATCH = 64


def evaluate(options: argparse.Namespace) -> None:
    """Prints {"accuracy", "correct", "interval_95", "metric", "n"} as one JSON line; for labels also what their
    probabilities are worth at the bundle's temperature: "ece", "nll" and "temperature"."""
    predictor = _load(options)
    try:
        rows = read_rows(options.data, labels=predictor.task.row_labels)
    except OSError as error:
        raise RowError(f"{options.data} can't be read: {error.strerror}", param="data") from error
    examples = [example for row in rows for example in predictor.encoder.encode(row)]
    result = evaluate_examples(predictor.lm, predictor.encoder, examples)
    print(json.dumps({**result.to_json(), **_trust(predictor, result, examples)}, sort_keys=True))


def _trust(predictor: Predictor, result: Evaluation, examples: Sequence[Example]) -> dict[str, float]:
    rows = Labelled.of(result.scores, [example.gold for example in examples]) if result.scores else None
    if not rows:
        return {}
    at = np.full(len(rows), predictor.temperature)
    return {
        "ece": expected_calibration_error(rows, at),
        "nll": negative_log_likelihood(rows, at),
        "temperature": predictor.temperature,
    }


def predict(options: argparse.Namespace) -> None:
    """Rows on stdin, one JSON object a line; answers on stdout, one JSON line each, in order. Below the probability
    `abstain_below` an answer is null and `abstained` true."""
    predictor = _load(options)
    if options.abstain_below is not None and predictor.task.type == "text":
        raise ConfigError("generated text has no probability to abstain below", param="abstain_below")
    waiting: list[Row] = []
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            waiting.append(parse_row(given, labels=predictor.task.row_labels, need_answer=False))
        except ValueError as error:
            raise RowError(f"line {number} is not JSON: {error}", line=number) from error
        except RowError as error:
            raise RowError(f"line {number}: {error.message}", param=error.param, line=number) from error
        if len(waiting) == BATCH:
            _answer(predictor, waiting, options)
            waiting = []
    _answer(predictor, waiting, options)


def _answer(predictor: Predictor, rows: list[Row], options: argparse.Namespace) -> None:
    for prediction in predictor.predict(rows, scale=options.scale):
        probability, least = prediction.probability, options.abstain_below
        abstained = least is not None and probability is not None and probability < least
        answer = {"answer": None if abstained else prediction.answer, "abstained": abstained}
        print(json.dumps({**asdict(prediction), **answer}), flush=True)


def _load(options: argparse.Namespace) -> Predictor:
    return load(
        options.bundle, model_dir=options.model_dir, cache_dir=options.cache_dir, device=options.device
    )
