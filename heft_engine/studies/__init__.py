"""What the numbers of several runs allow one to say: accuracies with intervals, and comparisons that claim no more.

    from heft_engine.studies import Arm, RowValues, compare_arms

Between two arms there are two questions, which are never mixed. Are these two *models* different? The rows are the
sample, and McNemar's exact test answers (`models`). Are the two *methods* different? The seeds are a sample too, and a
t test over their paired differences answers, with the rows' own noise added (`methods`). It does NOT know jobs,
databases or torch: outcomes go in, JSON values come out.
"""

from __future__ import annotations

from heft_engine.studies.accuracy import Accuracy, accuracy_of
from heft_engine.studies.arms import Arm, RowValues
from heft_engine.studies.compare import compare_arms
from heft_engine.studies.mcnemar import ModelComparison, compare_models
from heft_engine.studies.paired_seeds import MethodComparison, compare_methods

__all__ = [
    "Accuracy",
    "Arm",
    "MethodComparison",
    "ModelComparison",
    "RowValues",
    "accuracy_of",
    "compare_arms",
    "compare_methods",
    "compare_models",
]
