"""How right a written answer is, from 0 to 1, by the metrics that a task names.

exact_match   1 where both texts are equal without the white space around them.
final_number  1 where both end in the same number: the one behind the last `####` (GSM8K's mark), else the last one.
              Numbers are compared as numbers: 1,234.50 is $1234.5, and 1/2 is 0.5.
f1            overlap of words: harmonic mean of precision and recall over the words of both texts, without case,
              punctuation and articles, as for SQuAD (Rajpurkar et al., arXiv 1606.05250).
rouge_l       F-measure of the longest common subsequence of words (Lin 2004), without stemming. As everywhere, letters
              beyond a to z and digits separate words: it is a metric for English.

f1 and rouge_l are computed by torchmetrics, which is loaded where one of them is asked for. It does NOT know models.
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
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,100})?(?P<part>\.\d{1,100})?(?:/(?P<below>\d{1,100}))?"
)


def measure(name: MetricName, written: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """The metric of each written answer against the one that was wanted."""
    return [_METRICS[name](one, other) for one, other in zip(written, wanted, strict=True)]


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends in; None without one."""
    _, mark, marked = text.rpartition(_MARK)
    found = [number for match in _NUMBER.finditer(marked if mark else text) if (number := _number(match))]
    return (found[0] if mark else found[-1])[0] if found else None


def check_numbers(row: Row) -> None:
    """Raises RowError for an answer that `final_number` could only ever find wrong."""
    turns = [
        (f"messages[{index}].content", turn.content)
        for index, turn in enumerate(row.messages or ())
        if turn.role == "assistant" and turn.weight
    ]
    for field, answer in [("completion", row.answer)] if row.kind == "prompt" else turns:
        if answer is not None and final_number(answer) is None:
            raise RowError("no number in this answer, and final_number is to measure it", param=field)


def _number(match: re.Match[str]) -> tuple[Fraction] | None:
    """In a tuple, for 0 is a number too."""
    if match["whole"] is None and match["part"] is None:
        return None
    number = Fraction((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
    if match["below"] and int(match["below"]):
        number /= int(match["below"])
    return (-number,) if re.search("[-−]", match["sign"]) else (number,)


def _exact_match(written: str, wanted: str) -> float:
    return float(written.strip() == wanted.strip())


def _final_number(written: str, wanted: str) -> float:
    number = final_number(wanted)
    return float(number is not None and final_number(written) == number)


def _f1(written: str, wanted: str) -> float:
    from torchmetrics.functional.text.squad import squad

    right: dict[str, str | dict[str, list[str] | list[int]]] = {
        "answers": {"answer_start": [0], "text": [wanted]},
        "id": "row",
    }
    return float(squad([{"prediction_text": written, "id": "row"}], [right])["f1"]) / 100


def _rouge_l(written: str, wanted: str) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(written, wanted, rouge_keys="rougeL")["rougeL_fmeasure"])


_METRICS: Mapping[MetricName, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "final_number": _final_number,
    "f1": _f1,
    "rouge_l": _rouge_l,
}
