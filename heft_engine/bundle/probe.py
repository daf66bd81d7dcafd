"""A bundle's probe rows: a loaded model must give them the scores that training recorded."""

from __future__ import annotations

from heft_engine.bundle.format import Bundle
from heft_engine.errors import BundleError
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.scoring import ScoringRow, score_rows


def check_probe(bundle: Bundle, variant: ModelVariant) -> None:
    """Scores a bundle's probe rows with `variant`.

    Raises BundleError when a score differs by more than the tolerance that the bundle states, or is NaN.
    """
    tolerance = bundle.info.probe_tolerance
    scores = score_rows([ScoringRow(example=example, variant=variant) for example in bundle.probe.examples])
    for index, (actual, recorded) in enumerate(zip(scores, bundle.probe.scores, strict=True)):
        difference = max(abs(a - b) for a, b in zip(actual.totals, recorded, strict=True))
        if not difference <= tolerance:
            raise BundleError(
                f"probe row {index} scores {difference:.3g} away from what training saw (tolerance "
                f"{tolerance:.3g}): this is not the model that was trained"
            )
