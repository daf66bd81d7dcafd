"""`heft predict`: one question, or a file of them, to a model."""

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

#: What asks; a row's answer, if it has one, stays here.
_ASKING = ("question", "passage", "choices", "prompt", "messages")


def predict(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A fine-tuned model, a checkpoint or a base model.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    passage: Annotated[str | None, typer.Option(help="What the question is about.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, for models that write text.")] = None,
    file: Annotated[Path | None, typer.Option(help="A JSONL file of rows.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where a file's answers go. Begun before, it goes on. Else they go to stdout."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1_024, help="Rows in one request.")] = 64,
    requests: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 4,
    intervention: Annotated[bool, typer.Option(help="Stage 2 on or off.")] = True,
    scale: Annotated[float, typer.Option(help="How strongly stage 2 acts; 1 is as trained.")] = 1.0,
    abstain_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="Withhold answers that are less probable.")
    ] = None,
) -> None:
    """Ask a model."""
    asked: dict[str, Any] = {"model": model, "intervention": {"enabled": intervention, "scale": scale}}
    if abstain_below is not None:
        asked["abstain_below"] = abstain_below
    one = {"question": question, "passage": passage, "prompt": prompt}
    one = {name: value for name, value in one.items() if value is not None}
    if bool(one) == (file is not None):
        raise CommandError("give one question (--question or --prompt), or a file of rows (--file)")
    if out is not None and file is None:
        raise CommandError("--out is for the answers to a file of rows (--file)")
    with target(context).client() as client:
        if file is None:
            print(_one_line(client.post("/v1/predict", asked | one)))
        else:
            _whole_file(client, asked, file, out, batch=batch, requests=requests)


def _one_line(answer: dict[str, Any]) -> str:
    if answer.get("abstained"):
        labels: dict[str, float] = answer["label_probabilities"]
        likeliest = max(labels, key=lambda label: labels[label])
        return f"abstains  ({likeliest}: {labels[likeliest]:.3f})"
    sure = "" if answer["probability"] is None else f"  ({answer['probability']:.3f})"
    return f"{answer['answer']}{sure}"


def _whole_file(
    client: Client, asked: dict[str, Any], file: Path, out: Path | None, *, batch: int, requests: int
) -> None:
    from heft_engine.commands.resumable_output import AnswerFile, RowsFile, resume_answers
    from heft_engine.errors import ConfigError

    try:
        given = RowsFile.of(file)
        place = (
            nullcontext(AnswerFile(sys.stdout.buffer, 0))
            if out is None
            else resume_answers(out, given, asked)
        )
        with place as answers:
            began, already = time.monotonic(), answers.done
            try:
                with _opened(file) as stream:
                    lines = islice(_lines(file, stream), answers.done, None)
                    asyncio.run(_ask_all(client, asked, lines, answers, given.rows, batch, requests))
            except KeyboardInterrupt:
                again = "" if out is None else ": the same command goes on from there"
                raise CommandError(f"stopped after {answers.done:,} of {given.rows:,} rows{again}") from None
            except CommandError as error:
                raise CommandError(
                    f"{error} ({answers.done:,} of {given.rows:,} rows are answered)"
                ) from None
            seconds = time.monotonic() - began
    except OSError as error:
        raise CommandError(f"{error.filename or file}: {error.strerror}") from None
    except ConfigError as error:
        raise CommandError(error.message) from None
    if out is not None:
        print(_summary(file, out, answers.done - already, seconds), file=sys.stderr)


async def _ask_all(
    client: Client,
    asked: dict[str, Any],
    lines: Iterator[Line],
    answers: AnswerFile,
    total: int,
    batch: int,
    requests: int,
) -> None:
    from cli.bulk_predict import Bulk

    async with client.asynchronous(requests) as http:
        bulk = Bulk(http, asked, rows=batch, requests=requests)
        with _bar(total, answers.done) as advance:
            async with aclosing(bulk.answers(lines)) as blocks:
                async for block in blocks:
                    answers.write(block)
                    advance(answers.done)


def _opened(file: Path) -> TextIO:
    return file.open(encoding="utf-8-sig", newline="\n")


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    """On a terminal; `advance(done)` moves it."""
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
    """The rows of a file, as they are asked."""
    from cli.bulk_predict import Line

    for number, row in _rows(path, lines):
        yield Line(number=number, row={name: row[name] for name in _ASKING if name in row})


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
        raise CommandError(f"{path}, line {number}: not JSON ({error})") from None


def _summary(file: Path, out: Path, answered: int, seconds: float) -> str:
    """Rows a second of this run; answers by label and, where rows say what is right, accuracy of the whole file."""
    found: Counter[str] = Counter()
    known = right = abstained = 0
    with _opened(file) as rows, out.open(encoding="utf-8") as answers:
        for (_, row), line in zip(_rows(file, rows), answers, strict=True):
            answer = json.loads(line)
            if answer.get("abstained"):
                abstained += 1
                continue
            if answer.get("probability") is not None:
                found[answer["answer"]] += 1
            if (gold := _gold(row)) is not None:
                known += 1
                right += answer["answer"].strip() == gold
    parts = [f"{answered:,} rows in {seconds:.1f} s: {answered / max(seconds, 1e-9):.1f} a second"]
    if found:
        parts.append(", ".join(f"{label} {count:,}" for label, count in found.most_common(10)))
    if abstained:
        parts.append(f"abstained {abstained:,}")
    if known:
        parts.append(f"accuracy {right / known:.1%} ({right:,} of {known:,} answered)")
    return "\n".join(parts)


def _gold(row: dict[str, Any]) -> str | None:
    """The right answer, where a row says it."""
    answer = row.get("answer", row.get("completion"))
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return answer.strip() if isinstance(answer, str) else None
