"""Small generated data sets, so that a first job needs neither the hub nor a file.

Rows are dicts in the formats of heft_engine.data.rows. Imports nothing heavy: `heft demo` uses it too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Literal, get_args

from heft_engine.data.sample_scenes import NAMES, SCENES, Scene
from heft_engine.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
#: Tenths of the names in each split. Splits share no name, and so no question.
_TENTHS = {"train": 7, "validation": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A data set. `rows`: the number of rows of `sample:<name>:<split>`."""

    description: str
    rows: Mapping[Split, int]
    generate: Callable[[Split, random.Random], Iterator[dict[str, Any]]]


def generate(name: str, split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Returns `n` rows of a sample (None: its default number); equal arguments give equal rows everywhere.

    Raises ConfigError for an unknown sample or split, or for more rows than the sample has.
    """
    if name not in SAMPLES:
        message = f"sample {name!r} does not exist; the samples are {', '.join(SAMPLES)}"
        raise ConfigError(message, param="training_file")
    if split not in SPLITS:
        message = f"sample {name!r} has no split {split!r}; its splits are {', '.join(SPLITS)}"
        raise ConfigError(message, param="training_file")
    sample = SAMPLES[name]
    count = sample.rows[split] if n is None else n
    # A string seeds the generator with its SHA-512, so rows are the same on every machine and Python.
    rows = list(islice(sample.generate(split, random.Random(f"{name}/{split}/{seed}")), count))
    if len(rows) < count:
        message = f"sample {name!r} has only {len(rows):,} rows in split {split!r}"
        raise ConfigError(message, param="training_file")
    return rows


def _passages(split: Split, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yields pairs of rows with the same question, answered yes and no: the question alone does not tell the answer.

    Each passage describes a second place too. Half of the time it is of the same kind, with either answer equally
    often, so that the answer depends on which place a sentence is about, not on its words alone.
    """
    names = _names(split)
    pairs = list(product(SCENES, names))
    rng.shuffle(pairs)
    for scene, name in pairs:
        question = scene.question.format(x=f"the {name} {scene.kind}")
        for answer in rng.sample([True, False], 2):
            yield {
                "question": question,
                "passage": _passage(scene, name, names, answer, rng),
                "answer": answer,
            }


def _passage(scene: Scene, name: str, names: list[str], answer: bool, rng: random.Random) -> str:
    other_name = rng.choice([candidate for candidate in names if candidate != name])
    relevant = _statement(scene, name, answer, rng)
    other_scene = scene if rng.random() < 0.5 else rng.choice(SCENES)
    sentences = [relevant, _statement(other_scene, other_name, rng.random() < 0.5, rng)]
    rng.shuffle(sentences)
    if rng.random() < 0.5:
        sentences.insert(sentences.index(relevant) + 1, rng.choice(scene.aside))
    return " ".join(sentences)


def _statement(scene: Scene, name: str, answer: bool, rng: random.Random) -> str:
    statement = rng.choice(scene.yes if answer else scene.no).format(x=f"the {name} {scene.kind}")
    return statement[0].upper() + statement[1:]


def _names(split: Split) -> list[str]:
    splits = [name for name, tenths in _TENTHS.items() for _ in range(tenths)]
    shuffled = random.Random("names").sample(NAMES, len(NAMES))
    return [name for index, name in enumerate(shuffled) if splits[index % len(splits)] == split]


SAMPLES: Mapping[str, Sample] = {
    "passages": Sample(
        description="Yes/no questions about invented places, each answered by its short passage.",
        rows={"train": 800, "validation": 100, "test": 200},
        generate=_passages,
    ),
}
