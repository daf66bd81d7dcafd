"""`heft predict`: one question, or a file of them, to a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.errors import CommandError
from cli.options import target

#: Rows in one request.
_BATCH = 256
#: What asks; a row's answer, if it has one, stays here.
_ASKING = ("question", "passage", "choices", "prompt", "messages")


def predict(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A fine-tuned model, a checkpoint or a base model.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    passage: Annotated[str | None, typer.Option(help="What the question is about.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt, for models that write text.")] = None,
    file: Annotated[Path | None, typer.Option(help="A JSONL file of rows; answers go to stdout.")] = None,
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
    with target(context).client() as client:
        if file is None:
            answer = client.post("/v1/predict", asked | one)
            print(_one_line(answer))
            return
        rows = _rows(file)
        while batch := list(islice(rows, _BATCH)):
            for answer in client.post("/v1/predict", asked | {"inputs": batch})["data"]:
                print(json.dumps(answer, ensure_ascii=False))


def _one_line(answer: dict[str, Any]) -> str:
    if answer.get("abstained"):
        labels: dict[str, float] = answer["label_probabilities"]
        likeliest = max(labels, key=lambda label: labels[label])
        return f"abstains  ({likeliest}: {labels[likeliest]:.3f})"
    sure = "" if answer["probability"] is None else f"  ({answer['probability']:.3f})"
    return f"{answer['answer']}{sure}"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise CommandError(f"{path}, line {number}: not a JSON object")
                yield {name: row[name] for name in _ASKING if name in row}
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{path}, line {number}: not JSON ({error})") from None
