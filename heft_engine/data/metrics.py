"""Metrics of generated answers, each from 0 to 1.

exact_match   1 if both texts are equal apart from surrounding white space.
final_number  1 if both have the same final number: the one after the last `####` (GSM8K's mark), else the last one.
              Compared by value: 1,234.50 equals $1234.5, and 1/2 equals 0.5.
f1            SQuAD's token F1 (Rajpurkar et al., arXiv 1606.05250): the harmonic mean of precision and recall over the
              words of both texts, without case, punctuation and articles.
rouge_l       F-measure of the longest common subsequence of words (Lin 2004), without stemming. Characters other than
              a to z and digits separate words, as in other implementations: it is a metric for English.

torchmetrics computes f1 and rouge_l and is imported on first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from heft_engine.config.metric_names import MetricName
from heft_engine.data.rows import Row
from heft_engine.errors import RowError

_MARK = "####"
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?:(?<![\w)])[-−])?[$€£]?[-−]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,100})?(?P<fraction>\.\d{1,100})?(?:/(?P<denominator>\d{1,100}))?"
)


def measure(name: MetricName, generated: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns the metric of each generated answer against its reference."""
    metric = _METRICS[name]
    return [metric(answer, reference) for answer, reference in zip(generated, references, strict=True)]


def final_number(text: str) -> Fraction | None:
    """Returns the final number of an answer, or None without one."""
    _, mark, marked = text.rpartition(_MARK)
    numbers = [
        number
        for match in _NUMBER.finditer(marked if mark else text)
        if (number := _number(match)) is not None
    ]
    if not numbers:
        return None
    return numbers[0] if mark else numbers[-1]


def check_numbers(row: Row) -> None:
    """Raises RowError for a reference answer without a number: `final_number` would be 0 for any generated one."""
    turns = [
        (f"messages[{index}].content", turn.content)
        for index, turn in enumerate(row.messages or ())
        if turn.role == "assistant" and turn.weight
    ]
    for field, answer in [("completion", row.answer)] if row.kind == "prompt" else turns:
        if answer is not None and final_number(answer) is None:
            raise RowError("the metric final_number needs a number in every answer", param=field)


def _number(match: re.Match[str]) -> Fraction | None:
    if match["whole"] is None and match["fraction"] is None:
        return None
    number = Fraction((match["whole"] or "0").replace(",", "") + (match["fraction"] or ""))
    if match["denominator"] and int(match["denominator"]):
        number /= int(match["denominator"])
    return -number if re.search("[-−]", match["sign"]) else number


def _exact_match(generated: str, reference: str) -> float:
    return float(generated.strip() == reference.strip())


def _final_number(generated: str, reference: str) -> float:
    number = final_number(reference)
    return float(number is not None and final_number(generated) == number)


def _f1(generated: str, reference: str) -> float:
    from torchmetrics.functional.text.squad import squad

    target: dict[str, str | dict[str, list[str] | list[int]]] = {
        "answers": {"answer_start": [0], "text": [reference]},
        "id": "row",
    }
    return float(squad([{"prediction_text": generated, "id": "row"}], [target])["f1"]) / 100


def _rouge_l(generated: str, reference: str) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(generated, reference, rouge_keys="rougeL")["rougeL_fmeasure"])


_METRICS: Mapping[MetricName, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "final_number": _final_number,
    "f1": _f1,
    "rouge_l": _rouge_l,
}
