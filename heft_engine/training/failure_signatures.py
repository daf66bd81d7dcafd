"""The paper's failure signatures: what a run looks like when HEFT goes wrong, each with what to do about it.

Those at the end of a stage are here. Divergence and "does not train" are found in heft_engine.training.loop, a broken
merge in heft_engine.adapters.parity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heft_engine.bundle.format import Bundle, check_tokenizer
from heft_engine.config.train import Stage, parse_positions
from heft_engine.data.encoding import Encoder, Example, intervened_positions
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.errors import TrainingError
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.interventions import PlacedIntervention

#: Nats per token of general text beyond which a stage is said to have forgotten.
FORGETTING = 0.3


@dataclass(frozen=True, kw_only=True)
class FailureSignature:
    name: str
    message: str


def below_previous(stage: Stage, before: float | None, after: float | None) -> FailureSignature | None:
    """Returns "stage_below_previous" if a stage's metric is below that of the stage before it."""
    if before is None or after is None or after >= before:
        return None
    message = (
        f"Stage {stage.type} ends below the one before it: {after:.1%} after {before:.1%}. "
        f"Lower {stage.type}.learning_rate, or train fewer epochs; on few rows this may be chance"
    )
    return FailureSignature(name="stage_below_previous", message=message)


def forgetting(stage: Stage, before: float, after: float) -> FailureSignature | None:
    """Returns "forgetting" if the loss on general text has risen too far above the base's (nats a token)."""
    if not after - before > FORGETTING:
        return None
    message = (
        f"The model forgets: its loss on general text rose from {before:.2f} to {after:.2f} nats a token. "
        f"Lower {stage.type}.learning_rate or {stage.type}.rank, or train fewer epochs"
    )
    return FailureSignature(name="forgetting", message=message)


def check_positions(
    bundle: Bundle, encoder: Encoder, rows: Sequence[Row], interventions: Iterable[PlacedIntervention]
) -> None:
    """Compares prompts and intervened positions of serving with those of training, on some rows.

    Encodes the rows with the bundle's tokenizer and task, and with the encoder and interventions of training. Raises
    TrainingError (position_mismatch) if they differ.
    """
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    serving = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    placed = [(each.layer, each.positions) for each in interventions]
    stored = [(each.layer, each.positions) for each in bundle.interventions]
    for row in rows:
        for trained, served in zip(encoder.encode(row), serving.encode(row), strict=True):
            if trained != served:
                message = "serving would encode this task's rows to other tokens than training did"
                raise TrainingError(message, code="position_mismatch")
            if _intervened_tokens(placed, trained) != _intervened_tokens(stored, served):
                message = "serving would intervene at other positions than training did"
                raise TrainingError(message, code="position_mismatch")


def _intervened_tokens(interventions: list[tuple[int, str]], example: Example) -> list[tuple[int, list[int]]]:
    """Returns the layer and the intervened tokens of each intervention, for one prompt."""
    prompt = len(example.prompt)
    return [
        (layer, intervened_positions(prompt, *parse_positions(positions)))
        for layer, positions in interventions
    ]


def divergence_message(stage: Stage, loss: float) -> str:
    """Returns what to change in a stage whose loss has risen so far."""
    lower = f"Lower {stage.type}.learning_rate (now {float(stage.learning_rate):.1e})"
    rank = getattr(stage, "rank", None)
    smaller = f" or {stage.type}.rank (now {rank})" if rank is not None else ""
    return f"Stage {stage.type} diverges: its loss rose to {loss:.3g}. {lower}{smaller}"


def overflow_message(stage: Stage) -> str:
    """Returns what to change in a stage whose gradients, or whose loss, are too large for float16."""
    return (
        f"Stage {stage.type} does not fit float16: its loss or its gradients are not finite, with every loss scale "
        "down to 1. Choose dtype float32, or bfloat16 on a GPU that has it"
    )
