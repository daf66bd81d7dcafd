"""`evaluate` and `predict`: a bundle asked from a shell."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from heft_engine.commands.resumable_output import Answers, Input, resumed
from heft_engine.data.encoding import Example
from heft_engine.data.rows import Row, parse_row, read_rows
from heft_engine.errors import ConfigError, RowError
from heft_engine.evaluation.calibration import (
    LabelledScores,
    expected_calibration_error,
    negative_log_likelihood,
)
from heft_engine.evaluation.evaluate import Evaluation
from heft_engine.evaluation.evaluate import evaluate as evaluate_examples
from heft_engine.serving.predictor import Predictor, load

#: Rows answered together; enough to fill a forward pass.
BATCH = 64


def evaluate(options: argparse.Namespace) -> None:
    """Prints {"accuracy", "correct", "interval_95", "metric", "metrics", "n"} as one JSON line; for labels also what
    their probabilities are worth at the bundle's temperature: "ece", "nll" and "temperature"."""
    predictor = _load(options)
    try:
        rows = read_rows(options.data, labels=predictor.task.row_labels)
    except OSError as error:
        raise RowError(f"{options.data} can't be read: {error.strerror}", param="data") from error
    examples = [example for row in rows for example in predictor.encoder.encode(row)]
    result = evaluate_examples(
        predictor.lm, predictor.encoder, examples, max_new_tokens=predictor.max_new_tokens
    )
    print(json.dumps({**result.to_json(), **_trust(predictor, result, examples)}, sort_keys=True))


def _trust(predictor: Predictor, result: Evaluation, examples: Sequence[Example]) -> dict[str, float]:
    rows = LabelledScores.of(result.scores, [example.gold for example in examples]) if result.scores else None
    if not rows:
        return {}
    at = np.full(len(rows), predictor.temperature)
    return {
        "ece": expected_calibration_error(rows, at),
        "nll": negative_log_likelihood(rows, at),
        "temperature": predictor.temperature,
    }


def predict(options: argparse.Namespace) -> None:
    """Rows on stdin or in a file, one JSON object a line; answers on stdout or in a file, one JSON line each, in order.

    A file of answers that was begun before is gone on with. Below the probability `abstain_below` an answer is null and
    `abstained` true.
    """
    if options.out is not None and options.file is None:
        raise ConfigError("--out is for the answers to a file of rows (--file)", param="out")
    predictor = _load(options)
    if options.abstain_below is not None and predictor.task.type == "text":
        raise ConfigError("generated text has no probability to abstain below", param="abstain_below")
    try:
        with ExitStack() as stack:
            lines = sys.stdin
            if options.file is not None:
                lines = stack.enter_context(options.file.open(encoding="utf-8-sig", newline="\n"))
            answers = Answers(sys.stdout.buffer, 0)
            if options.out is not None:
                given = Input.of(options.file)
                answers = stack.enter_context(resumed(options.out, given, _asked(options)))
            rows = islice(_rows(predictor, lines), answers.done, None)
            while batch := list(islice(rows, BATCH)):
                answers.write(_answers(predictor, batch, options))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}", param="file") from error


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers besides the rows."""
    record = (options.bundle / "heft.json").read_bytes()
    return {
        "bundle_sha256": hashlib.sha256(record).hexdigest(),
        "scale": options.scale,
        "abstain_below": options.abstain_below,
    }


def _rows(predictor: Predictor, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_row(json.loads(line), labels=predictor.task.row_labels, need_answer=False)
        except ValueError as error:
            raise RowError(f"line {number} is not JSON: {error}", line=number) from error
        except RowError as error:
            raise RowError(f"line {number}: {error.message}", param=error.param, line=number) from error
        yield row


def _answers(
    predictor: Predictor, rows: Sequence[Row], options: argparse.Namespace
) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for prediction in predictor.predict(rows, scale=options.scale):
        probability, least = prediction.probability, options.abstain_below
        abstained = least is not None and probability is not None and probability < least
        answer = {"answer": None if abstained else prediction.answer, "abstained": abstained}
        found.append({**asdict(prediction), **answer})
    return found


def _load(options: argparse.Namespace) -> Predictor:
    return load(
        options.bundle, model_dir=options.model_dir, cache_dir=options.cache_dir, device=options.device
    )
