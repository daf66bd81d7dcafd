"""Small data sets that the project makes itself, so that a first job needs neither a hub nor a file.

Rows come out as the dicts that `heft_engine.data.rows` reads. It does NOT know models, and imports nothing heavy.
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
#: Of ten names, so many belong to each split: no name, and so no question, is in two of them.
_SHARE = {"train": 7, "validation": 1, "test": 2}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One data set: what it is, in a line, and how many rows `sample:<name>:<split>` has."""

    description: str
    rows: Mapping[Split, int]
    generate: Callable[[Split, random.Random], Iterator[dict[str, Any]]]


def generate(name: str, split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows of a sample (None: as many as it has by itself); the same for the same arguments, everywhere.

    Raises ConfigError for an unknown sample or split, or for more rows than it can make.
    """
    if name not in SAMPLES:
        raise ConfigError(
            f"there is no sample {name!r}; there are {', '.join(SAMPLES)}", param="training_file"
        )
    if split not in SPLITS:
        raise ConfigError(
            f"sample {name!r} has no split {split!r}; it has {', '.join(SPLITS)}", param="training_file"
        )
    sample = SAMPLES[name]
    # A string seeds the generator with its SHA-512: the same rows on every machine and Python.
    wanted = sample.rows[split] if n is None else n
    rows = list(islice(sample.generate(split, random.Random(f"{name}/{split}/{seed}")), wanted))
    if len(rows) < wanted:
        message = f"sample {name!r} has no more than {len(rows):,} rows of split {split!r}"
        raise ConfigError(message, param="training_file")
    return rows


def _passages(split: Split, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Pairs of rows with the same question, one answered yes and one no: the question alone says nothing.

    Each passage describes a second place too. Every other time it is of the same kind, with the other answer
    as often as with the same: then the words alone say nothing either, only what is said of whom.
    """
    names = _names(split)
    pairs = list(product(SCENES, names))
    chance.shuffle(pairs)
    for scene, name in pairs:
        question = scene.question.format(x=f"the {name} {scene.kind}")
        for answer in chance.sample([True, False], 2):
            yield {
                "question": question,
                "passage": _passage(scene, name, names, answer, chance),
                "answer": answer,
            }


def _passage(scene: Scene, name: str, names: list[str], answer: bool, chance: random.Random) -> str:
    other = chance.choice([candidate for candidate in names if candidate != name])
    told = _statement(scene, name, answer, chance)
    beside = _statement(
        scene if chance.random() < 0.5 else chance.choice(SCENES), other, chance.random() < 0.5, chance
    )
    sentences = [told, beside]
    chance.shuffle(sentences)
    if chance.random() < 0.5:
        sentences.insert(sentences.index(told) + 1, chance.choice(scene.aside))
    return " ".join(sentences)


def _statement(scene: Scene, name: str, answer: bool, chance: random.Random) -> str:
    statement = chance.choice(scene.yes if answer else scene.no).format(x=f"the {name} {scene.kind}")
    return statement[0].upper() + statement[1:]


def _names(split: Split) -> list[str]:
    shares = [share for share, tenths in _SHARE.items() for _ in range(tenths)]
    shuffled = random.Random("names").sample(NAMES, len(NAMES))
    return [name for index, name in enumerate(shuffled) if shares[index % len(shares)] == split]


SAMPLES: Mapping[str, Sample] = {
    "passages": Sample(
        description="Yes/no questions about invented places; only the short passage knows the answer.",
        rows={"train": 800, "validation": 100, "test": 200},
        generate=_passages,
    ),
}
