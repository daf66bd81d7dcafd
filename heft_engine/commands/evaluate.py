"""`evaluate`: the metrics of a bundle on rows with answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from heft_engine.commands.arguments import add_machine_arguments
from heft_engine.data.encoding import Example
from heft_engine.data.rows import read_rows
from heft_engine.evaluation.calibration import (
    LabelledScores,
    expected_calibration_error,
    negative_log_likelihood,
)
from heft_engine.evaluation.evaluate import Evaluation, evaluate
from heft_engine.serving.predictor import Predictor, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Prints {"accuracy", "correct", "interval_95", "metric", "metrics", "n"} as one JSON line.

    For labels it has the calibration at the bundle's temperature too: "ece", "nll" and "temperature".
    """
    predictor = load(args.bundle, model_dir=args.model_dir, cache_dir=args.cache_dir, device=args.device)
    rows = read_rows(args.data, param="data", labels=predictor.task.row_labels)
    examples = [example for row in rows for example in predictor.encoder.encode(row)]
    limit = predictor.max_new_tokens
    evaluation = evaluate(predictor.lm, predictor.encoder, examples, max_new_tokens=limit)
    print(
        json.dumps({**evaluation.to_json(), **_calibration(predictor, evaluation, examples)}, sort_keys=True)
    )


def _calibration(
    predictor: Predictor, evaluation: Evaluation, examples: Sequence[Example]
) -> dict[str, float]:
    if not evaluation.scores:
        return {}
    rows = LabelledScores.of(evaluation.scores, [example.gold for example in examples])
    if not rows:
        return {}
    temperatures = np.full(len(rows), predictor.temperature)
    return {
        "ece": expected_calibration_error(rows, temperatures),
        "nll": negative_log_likelihood(rows, temperatures),
        "temperature": predictor.temperature,
    }
