"""The sample data: reproducible, with disjoint splits, and unsolvable without reading the passage."""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest

from heft_engine.data.rows import parse_row
from heft_engine.data.samples import SAMPLES, SPLITS, generate
from heft_engine.errors import ConfigError

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def splits() -> dict[str, Rows]:
    return {split: generate("passages", split) for split in SPLITS}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_every_row_of_every_sample_is_a_row() -> None:
    for name, sample in SAMPLES.items():
        assert sample.description
        for split in SPLITS:
            rows = generate(name, split)
            assert len(rows) == sample.rows[split]
            assert {parse_row(row).kind for row in rows} == {"yes_no"}


def test_the_same_arguments_give_the_same_rows() -> None:
    assert generate("passages", "train", 40, 1) == generate("passages", "train", 60, 1)[:40]
    assert generate("passages", "train", 40, 1) != generate("passages", "train", 40, 2)


def test_the_rows_do_not_depend_on_the_process() -> None:
    code = "from heft_engine.data.samples import generate; print(generate('passages', 'test', 9, 3))"
    command = [sys.executable, "-c", code]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    ).stdout
    assert said.strip() == str(generate("passages", "test", 9, 3))


def test_splits_share_neither_questions_nor_passages_nor_names(splits: dict[str, Rows]) -> None:
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        for row in rows:
            names = re.findall(r"[Tt]he ([A-Z]\w+) ", row["passage"])
            assert names
            for item in (row["question"], row["passage"], *names):
                assert seen.setdefault(item, split) == split


def test_no_row_repeats_another(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        assert len({row["passage"] for row in rows}) == len(rows)


def test_the_question_alone_says_nothing(splits: dict[str, Rows]) -> None:
    """Each question stands there twice, with both answers."""
    for rows in splits.values():
        answers = defaultdict(set)
        for row in rows:
            answers[row["question"]].add(row["answer"])
        assert all(both == {True, False} for both in answers.values())
        assert Counter(row["answer"] for row in rows)[True] == len(rows) / 2


def test_words_in_common_say_next_to_nothing(splits: dict[str, Rows]) -> None:
    """The best threshold on how many of the question's words stand in the passage, chosen on the rows themselves."""
    rows = generate("passages", "train", 2_000)
    overlap = [len(words(row["question"]) & words(row["passage"])) for row in rows]
    best = max(
        max(right, len(rows) - right)
        for bound in set(overlap)
        for right in [
            sum((count >= bound) == row["answer"] for count, row in zip(overlap, rows, strict=True))
        ]
    )
    assert best / len(rows) < 0.6


def test_a_bag_of_words_is_far_from_enough() -> None:
    """Naive Bayes over the passage's words does not suffice: it ignores which place a sentence is about."""
    train, test = generate("passages", "train", 2_000), generate("passages", "test", 600)
    counts = {
        answer: Counter(w for r in train if r["answer"] == answer for w in words(r["passage"]))
        for answer in (True, False)
    }
    right = sum(
        (sum(_log_ratio(counts, word) for word in words(row["passage"])) > 0) == row["answer"] for row in test
    )
    assert right / len(test) < 0.8


def _log_ratio(counts: dict[bool, Counter[str]], word: str) -> float:
    from math import log

    return log((counts[True][word] + 1) / (counts[False][word] + 1))


def test_rows_are_short(splits: dict[str, Rows]) -> None:
    lengths = [len((row["passage"] + row["question"]).split()) for row in splits["train"]]
    assert max(lengths) < 60
    assert sum(lengths) / len(lengths) < 40


def test_a_sample_has_an_end() -> None:
    with pytest.raises(ConfigError, match=r"only [\d,]+ rows in split 'validation'"):
        generate("passages", "validation", 100_000)


@pytest.mark.parametrize(("name", "split"), [("absent", "train"), ("passages", "dev")])
def test_unknown_names_are_refused(name: str, split: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist|has no split"):
        generate(name, split)


def test_samples_need_no_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]"
    code = f"import sys, heft_engine.data.samples; print({heavy})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
