"""The real pyreft beside the engine: the same base, the same rows, laid out and trained pyreft's way.

Each side gets a copy of the base of its own: pyvene takes every hook off the model that it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyreft
import torch
import transformers
from torch import Tensor, nn

from heft_engine.data.encoding import Example
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM

_PAD = 2
_NO_LABEL = -100


def packed(path: Path, dtype: torch.dtype = torch.float32) -> PackedLM:
    """The engine's side: the base of a directory as a PackedLM."""
    return PackedLM(load_model(resolve_path(path), dtype=dtype, attention=IMPLEMENTATION))


def plain(path: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The base as transformers alone loads it (eager attention knows windows and soft caps)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def own_class(kind: str) -> Any:
    """pyreft's class of that kind."""
    return getattr(pyreft, f"{kind.capitalize()}Intervention")


def reft_model(
    model: transformers.PreTrainedModel, layers: Sequence[int], rank: int, kind: str = "loreft"
) -> pyreft.ReftModel:
    """A trainable ReFT model, as pyreft's README builds one."""
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": own_class(kind)(
                embed_dim=model.config.hidden_size,
                low_rank_dimension=rank,
                dtype=torch.float32,
                add_bias=False,
            ),
        }
        for layer in layers
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def load_exactly(directory: Path, model: transformers.PreTrainedModel) -> pyreft.ReftModel:
    """`ReftModel.load`, and the two lines that undo its bfloat16: see heft_engine.bundle.pyreft_format."""
    loaded = pyreft.ReftModel.load(str(directory), model)
    for key, intervention in loaded.interventions.items():
        intervention.learned_source.float()
        intervention.load_state_dict(torch.load(directory / f"intkey_{key}.bin"))
    return loaded


def copy_raw(source: nn.Module, target: nn.Module) -> None:
    """Raw parameters and the parametrisation's base from one side to the other: they have the same names.

    pyreft's own state_dict holds R baked, so nn.Module's is called past it.
    """
    state = nn.Module.state_dict(source)
    parameters = {
        name: tensor for name, tensor in state.items() if name not in ("embed_dim", "interchange_dim")
    }
    result = nn.Module.load_state_dict(target, parameters, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"embed_dim", "interchange_dim"}


def interventions(reft: pyreft.ReftModel) -> list[Any]:
    return list(reft.interventions.values())


def rotation_error(intervention: Any) -> float:
    """‖RRᵀ − I‖ of pyreft's intervention."""
    rotation = intervention.rotate_layer.weight.detach()
    return float(torch.linalg.matrix_norm(rotation.T @ rotation - torch.eye(rotation.shape[1])))


def padded(examples: Sequence[Example], positions: Sequence[str]) -> dict[str, Tensor]:
    """A batch as pyreft's datasets and collator make it: a dummy token first, at which positions that a short
    prompt does not have point; every position moved by one; padding on the right.

    `positions` has one entry for each intervention.
    """
    rows = []
    for example in examples:
        (answer,) = example.answers
        last = len(example.prompt)
        places = [
            pyreft.get_intervention_locations(
                last_position=last, positions=place, num_interventions=1, share_weights=True
            )[0]
            for place in positions
        ]
        ids = [_PAD, *example.prompt, *answer]
        labels = [_NO_LABEL] * (last + 1) + list(answer)
        rows.append((ids, labels, [[at + 1 for at in place] for place in places]))
    width = max(len(ids) for ids, _, _ in rows)
    units = max(len(place) for _, _, places in rows for place in places)
    return {
        "input_ids": torch.tensor([ids + [_PAD] * (width - len(ids)) for ids, _, _ in rows]),
        "attention_mask": torch.tensor(
            [[0] + [1] * (len(ids) - 1) + [0] * (width - len(ids)) for ids, _, _ in rows]
        ),
        "labels": torch.tensor([labels + [_NO_LABEL] * (width - len(labels)) for _, labels, _ in rows]),
        "intervention_locations": torch.tensor(
            [[place + [0] * (units - len(place)) for place in places] for _, _, places in rows]
        ),
    }


def loss(reft: pyreft.ReftModel, batch: dict[str, Tensor]) -> Tensor:
    """The loss by pyreft's own trainer, which needs no instance for it. (Its `train` breaks on transformers ≥ 4.46.)"""
    return pyreft.ReftTrainer.compute_loss(None, reft, batch)


@torch.no_grad()
def answer_logits(reft: pyreft.ReftModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits that predict the supervised tokens, row by row: (tokens, vocabulary)."""
    locations = batch["intervention_locations"].permute(1, 0, 2).tolist()
    _, output = reft(
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        unit_locations={"sources->base": (None, locations)},
    )
    return output.logits[:, :-1][batch["labels"][:, 1:] != _NO_LABEL]


def train_steps(
    reft: pyreft.ReftModel, batches: Sequence[dict[str, Tensor]], learning_rate: float
) -> list[float]:
    """Optimiser steps as transformers' Trainer takes them by default: AdamW, linear decay, clipping at 1."""
    parameters = reft.get_trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    losses = []
    for batch in batches:
        value = loss(reft, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def label_logits(theirs: Any, examples: list[Example], positions: list[str]) -> torch.Tensor:
    """pyreft's logits of every label of each example: (examples, labels)."""
    single = [Example(prompt=e.prompt, answers=(e.answers[0],), labels=("any",), gold=0) for e in examples]
    logits = answer_logits(theirs, padded(single, positions))
    return torch.stack([row[[a[0] for a in e.answers]] for row, e in zip(logits, examples, strict=True)])
