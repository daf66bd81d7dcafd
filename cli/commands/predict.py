"""`heft predict`: answers to one question or to a file of rows."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cli.errors import CommandError
from cli.options import target

if TYPE_CHECKING:
    from cli.bulk_predict import Line
    from cli.client import Client
    from heft_engine.commands.resumable_output import AnswerFile

#: The fields of a row that are sent; its answer is not.
_QUESTION_FIELDS = ("question", "passage", "choices", "prompt", "messages")


def predict(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A fine-tuned model, a checkpoint or a base model.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    passage: Annotated[str | None, typer.Option(help="The passage that the question is about.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, for models that generate text.")] = None,
    file: Annotated[Path | None, typer.Option(help="A JSONL file of rows.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the answers to --file (else stdout). An interrupted run is continued."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1_024, help="Rows per request.")] = 64,
    requests: Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests.")] = 4,
    intervention: Annotated[bool, typer.Option(help="Apply stage 2's intervention.")] = True,
    scale: Annotated[float, typer.Option(help="Scale of stage 2's intervention; 1 is as trained.")] = 1.0,
    abstain_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="Abstain from answers with a lower probability.")
    ] = None,
) -> None:
    """Answer one question, or a file of rows, with a model."""
    common: dict[str, Any] = {"model": model, "intervention": {"enabled": intervention, "scale": scale}}
    if abstain_below is not None:
        common["abstain_below"] = abstain_below
    fields = {"question": question, "passage": passage, "prompt": prompt}
    fields = {name: value for name, value in fields.items() if value is not None}
    if bool(fields) == (file is not None):
        raise CommandError("set --question or --prompt for one question, or --file for a file of rows")
    if out is not None and file is None:
        raise CommandError("--out needs --file")
    with target(context).client() as client:
        if file is None:
            print(_answer_line(client.post("/v1/predict", common | fields)))
        else:
            _predict_file(client, common, file, out, batch=batch, requests=requests)


def _answer_line(answer: dict[str, Any]) -> str:
    if answer.get("abstained"):
        labels: dict[str, float] = answer["label_probabilities"]
        most_probable = max(labels, key=lambda label: labels[label])
        return f"abstained  ({most_probable}: {labels[most_probable]:.3f})"
    probability = "" if answer["probability"] is None else f"  ({answer['probability']:.3f})"
    return f"{answer['answer']}{probability}"


def _predict_file(
    client: Client, common: dict[str, Any], file: Path, out: Path | None, *, batch: int, requests: int
) -> None:
    from heft_engine.commands.resumable_output import AnswerFile, RowsFile, resume_answers
    from heft_engine.errors import ConfigError

    try:
        rows = RowsFile.of(file)
        output = (
            nullcontext(AnswerFile(sys.stdout.buffer, 0))
            if out is None
            else resume_answers(out, rows, common)
        )
        with output as answers:
            started_at, done_before = time.monotonic(), answers.done
            try:
                with _opened(file) as stream:
                    lines = islice(_lines(file, stream), answers.done, None)
                    asyncio.run(_predict_lines(client, common, lines, answers, rows.rows, batch, requests))
            except KeyboardInterrupt:
                hint = "" if out is None else ": run the same command again to continue"
                raise CommandError(
                    f"interrupted after {answers.done:,} of {rows.rows:,} rows{hint}"
                ) from None
            except CommandError as error:
                raise CommandError(f"{error} ({answers.done:,} of {rows.rows:,} rows are answered)") from None
            seconds = time.monotonic() - started_at
    except OSError as error:
        raise CommandError(f"{error.filename or file}: {error.strerror}") from None
    except ConfigError as error:
        raise CommandError(error.message) from None
    if out is not None:
        print(_summary(file, out, answers.done - done_before, seconds), file=sys.stderr)


async def _predict_lines(
    client: Client,
    common: dict[str, Any],
    lines: Iterator[Line],
    answers: AnswerFile,
    total: int,
    batch_size: int,
    requests: int,
) -> None:
    from cli.bulk_predict import BulkPredictor

    async with client.asynchronous(requests) as http:
        predictor = BulkPredictor(http, common, batch_size=batch_size, requests=requests)
        with _progress_bar(total, answers.done) as advance:
            async with aclosing(predictor.answers(lines)) as batches:
                async for batch in batches:
                    answers.write(batch)
                    advance(answers.done)


def _opened(file: Path) -> TextIO:
    return file.open(encoding="utf-8-sig", newline="\n")


@contextmanager
def _progress_bar(total: int, done: int) -> Iterator[Any]:
    """Shows a bar on a terminal; the yielded function sets the number of rows done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rows", total=total, completed=done)
        yield lambda done: progress.update(task, completed=done)


def _lines(path: Path, lines: Iterable[str]) -> Iterator[Line]:
    """Yields the rows of a file with the fields that are sent."""
    from cli.bulk_predict import Line

    for number, row in _rows(path, lines):
        yield Line(number=number, row={name: row[name] for name in _QUESTION_FIELDS if name in row})


def _rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise CommandError(f"{path}, line {number}: not a JSON object")
            yield number, row
    except ValueError as error:
        raise CommandError(f"{path}, line {number}: not valid JSON ({error})") from None


def _summary(file: Path, out: Path, answered: int, seconds: float) -> str:
    """Rows per second of this run; over the whole file the answers by label, and the accuracy if rows have answers."""
    labels: Counter[str] = Counter()
    with_gold = correct = abstained = 0
    with _opened(file) as rows, out.open(encoding="utf-8") as answers:
        for (_, row), line in zip(_rows(file, rows), answers, strict=True):
            answer = json.loads(line)
            if answer.get("abstained"):
                abstained += 1
                continue
            if answer.get("probability") is not None:
                labels[answer["answer"]] += 1
            if (gold := _gold(row)) is not None:
                with_gold += 1
                correct += answer["answer"].strip() == gold
    parts = [f"{answered:,} rows in {seconds:.1f} s: {answered / max(seconds, 1e-9):.1f} rows/s"]
    if labels:
        parts.append(", ".join(f"{label} {count:,}" for label, count in labels.most_common(10)))
    if abstained:
        parts.append(f"abstained {abstained:,}")
    if with_gold:
        parts.append(f"accuracy {correct / with_gold:.1%} ({correct:,} of {with_gold:,} answered)")
    return "\n".join(parts)


def _gold(row: dict[str, Any]) -> str | None:
    """Returns the right answer of a row, if it has one."""
    answer = row.get("answer", row.get("completion"))
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return answer.strip() if isinstance(answer, str) else None
