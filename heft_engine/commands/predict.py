"""`predict`: answers of a bundle for rows on stdin or in a file."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from heft_engine.commands.arguments import add_machine_arguments
from heft_engine.commands.resumable_output import AnswerFile, RowsFile, resume_answers
from heft_engine.data.rows import Row, parse_row
from heft_engine.errors import ConfigError, RowError
from heft_engine.serving.predictor import Predictor, load

#: Rows answered together: enough to fill a forward pass.
BATCH_ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--file", type=Path, help="rows, one JSON object a line; default: stdin")
    parser.add_argument(
        "--out", type=Path, help="a file for the answers to --file; an interrupted one is continued"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of interventions; 0 leaves them out")
    parser.add_argument("--abstain-below", type=_probability, help="less probable answers are null (0 to 1)")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Answers rows, one JSON object a line, with one JSON line each, in their order.

    Below the probability `abstain_below` an answer is null and `abstained` true.
    """
    if args.out is not None and args.file is None:
        raise ConfigError("--out is for the answers to a file of rows (--file)", param="out")
    predictor = load(args.bundle, model_dir=args.model_dir, cache_dir=args.cache_dir, device=args.device)
    if args.abstain_below is not None and predictor.task.type == "text":
        raise ConfigError("generated text has no probability to abstain below", param="abstain_below")
    try:
        with ExitStack() as stack:
            lines = sys.stdin
            if args.file is not None:
                lines = stack.enter_context(args.file.open(encoding="utf-8-sig", newline="\n"))
            answers = AnswerFile(sys.stdout.buffer, 0)
            if args.out is not None:
                rows_file = RowsFile.of(args.file)
                answers = stack.enter_context(resume_answers(args.out, rows_file, _settings(args)))
            rows = islice(_rows(predictor, lines), answers.done, None)
            while batch := list(islice(rows, BATCH_ROWS)):
                answers.write(_answers(predictor, batch, args))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}", param="file") from error


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("between 0 and 1")
    return value


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns everything that the answers depend on besides the rows."""
    record = (args.bundle / "heft.json").read_bytes()
    return {
        "bundle_sha256": hashlib.sha256(record).hexdigest(),
        "scale": args.scale,
        "abstain_below": args.abstain_below,
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


def _answers(predictor: Predictor, rows: Sequence[Row], args: argparse.Namespace) -> list[Mapping[str, Any]]:
    answers: list[Mapping[str, Any]] = []
    for prediction in predictor.predict(rows, scale=args.scale):
        probability, threshold = prediction.probability, args.abstain_below
        abstained = threshold is not None and probability is not None and probability < threshold
        answer = {"answer": None if abstained else prediction.answer, "abstained": abstained}
        answers.append({**asdict(prediction), **answer})
    return answers
