"""The rows of HEFT and baselines, encoded once by the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from heft_engine.config.train import TaskSettings
from heft_engine.data import samples
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row, infer_task, parse_row
from heft_engine.data.task import Task
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer, resolve
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import choose_dtype


def base_model(reference: str) -> BaseModel:
    return resolve(reference, allow_paths=True)


def packed_model(base: BaseModel) -> PackedLM:
    """Returns the model in the dtype that a run would choose on this machine."""
    return PackedLM(
        load_model(base, dtype=choose_dtype("auto", "cpu"), device="cpu", attention=IMPLEMENTATION)
    )


def read(data: Path | None, count: int) -> list[Row]:
    if data is None:
        objects = list(samples.generate("passages", "train"))[:count]
    else:
        objects = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    rows = [parse_row(row) for row in objects]
    if len(rows) < count:
        raise SystemExit(f"{count} rows are needed, but there are {len(rows)}")
    return rows


def examples(base: BaseModel, data: Path | None, count: int, length: int | None = None) -> list[Example]:
    """Returns the first `count` rows of a JSONL file (None: of the sample), with their right answers.

    `length`: tokens of every prompt, which is cut, or extended at its front with tokens of other rows.
    """
    rows = read(data, count)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), infer_task(rows)))
    supervised = [example.supervised() for row in rows for example in encoder.encode(row)]
    if length is None:
        return supervised
    pool = [token for example in supervised for token in example.prompt] * (1 + length // 64)
    return [
        replace(example, prompt=(*pool[37 * i : 37 * i + length], *example.prompt)[-length:])
        for i, example in enumerate(supervised)
    ]
