"""Packed models of a directory, a few rows to probe them with, and their weights' bits."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from heft_engine.adapters.parity import probe_states
from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.data.encoding import Example
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM


def packed(path: Path, dtype: torch.dtype = torch.float32) -> PackedLM:
    return PackedLM(load_model(resolve_path(path), dtype=dtype, attention=IMPLEMENTATION))


def with_intervention(path: Path, positions: str, dtype: torch.dtype = torch.float32) -> PackedLM:
    """A packed model with a random, frozen intervention at layer 1."""
    lm = packed(path, dtype)
    torch.manual_seed(0)
    intervention = LoreftIntervention(lm.hidden_size, 4)
    intervention.freeze()
    lm.interventions.add(PlacedIntervention(layer=1, positions=positions, intervention=intervention.eval()))
    return lm


def probes() -> list[Example]:
    rng = random.Random(0)
    rows = [tuple(rng.randrange(5, 600) for _ in range(n)) for n in (5, 20, 40)]
    return [Example(prompt=row, answers=((7, 9),), labels=("",), gold=0) for row in rows]


@torch.inference_mode()
def probe_logits(lm: PackedLM, examples: list[Example]) -> Tensor:
    """Returns float32 logits at the supervised tokens, interventions disabled: (tokens, vocabulary)."""
    return lm.logits(probe_states(lm, examples)).cpu()


def bits(lm: PackedLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
