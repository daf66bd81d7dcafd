"""The paper's failure signatures: what a run looks like when HEFT goes wrong, each with what to do about it.

Divergence and "does not train" are seen inside the loop (heft_engine.training.loop), a broken merge in
heft_engine.adapters.lora.merge;
these are the ones that show at the end of a stage. It does NOT emit events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heft_engine.bundle.format import Bundle, check_tokenizer
from heft_engine.config.train import LoraStage, ReftStage, parse_positions
from heft_engine.data.encoding import Encoder, Example, intervened_positions
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.errors import TrainingError
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.interventions import PlacedIntervention

#: Nats per token of general text beyond which a stage is said to have forgotten.
FORGETTING = 0.3


@dataclass(frozen=True, kw_only=True)
class Signature:
    name: str
    message: str


def below_previous(
    stage: LoraStage | ReftStage, before: float | None, after: float | None
) -> Signature | None:
    """A stage that ends below the one before it."""
    if before is None or after is None or after >= before:
        return None
    message = (
        f"Stage {stage.type} ends below the one before it: {after:.1%} after {before:.1%}. "
        f"Lower {stage.type}.learning_rate, or train fewer epochs; on few rows this may be chance"
    )
    return Signature(name="stage_below_previous", message=message)


def forgetting(stage: LoraStage | ReftStage, before: float, after: float) -> Signature | None:
    """General text that the task never saw has become harder, compared with the base."""
    if not after - before > FORGETTING:
        return None
    message = (
        f"The model forgets: its loss on general text rose from {before:.2f} to {after:.2f} nats a token. "
        f"Lower {stage.type}.learning_rate or {stage.type}.rank, or train fewer epochs"
    )
    return Signature(name="forgetting", message=message)


def check_positions(
    bundle: Bundle, encoder: Encoder, rows: Sequence[Row], interventions: Iterable[PlacedIntervention]
) -> None:
    """Serving must see what training saw: the same prompt tokens, the same interventions at the same positions.

    Encodes rows anew with the tokenizer and the task that the bundle holds, and compares with the encoder and the
    interventions of training. Raises TrainingError (position_mismatch).
    """
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    served = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    stood = [(placed.layer, placed.positions) for placed in interventions]
    stored = [(placed.layer, placed.positions) for placed in bundle.interventions]
    for row in rows:
        for trained, asked in zip(encoder.encode(row), served.encode(row), strict=True):
            if trained != asked:
                raise TrainingError(
                    "serving would ask other tokens than training saw", code="position_mismatch"
                )
            if _places(stood, trained) != _places(stored, asked):
                raise TrainingError(
                    "serving would intervene at other positions than training did", code="position_mismatch"
                )


def _places(interventions: list[tuple[int, str]], example: Example) -> list[tuple[int, list[int]]]:
    """Layer and intervened tokens of each site, for one prompt."""
    prompt = len(example.prompt)
    return [(layer, intervened_positions(prompt, *parse_positions(spec))) for layer, spec in interventions]
