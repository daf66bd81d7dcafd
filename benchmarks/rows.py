"""The rows that both sides train on, tokenised once, in the engine's own encoding."""

from __future__ import annotations

import json
from pathlib import Path

from heft_engine import samples
from heft_engine.attention import IMPLEMENTATION
from heft_engine.base_models import BaseModel, load_model, load_tokenizer, resolve
from heft_engine.config import TaskSettings
from heft_engine.devices import choose_dtype
from heft_engine.encoding import Encoder, Example, Task
from heft_engine.model import PackedLM
from heft_engine.rows import infer_task, parse_row


def base_model(reference: str) -> BaseModel:
    return resolve(reference, allow_paths=True)


def packed_model(base: BaseModel) -> PackedLM:
    """Our side, in the dtype that a run would choose here."""
    return PackedLM(
        load_model(base, dtype=choose_dtype("auto", "cpu"), device="cpu", attention=IMPLEMENTATION)
    )


def examples(base: BaseModel, data: Path | None, count: int) -> list[Example]:
    """The first `count` rows of a file of JSON lines (or of the generated sample), supervised."""
    if data is None:
        found = list(samples.generate("passages", "train"))[:count]
    else:
        found = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    rows = [parse_row(row) for row in found]
    if len(rows) < count:
        raise SystemExit(f"{count} rows are needed, there are {len(rows)}")
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), infer_task(rows)))
    return [example.supervised() for row in rows for example in encoder.encode(row)]
