"""Predefined studies: their arms, with the paper's values where it states them.

All other settings are "auto" or have their defaults (docs/settings.md).
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, get_args

from heft_engine.config.train import ReftStage
from store.errors import InvalidRequest

Preset = Literal[
    "paper_table",  #: LoRA alone, ReFT alone, HEFT short and long: the paper's table
    "equal_compute",  #: HEFT, and each of its stages alone with the same compute
    "order",  #: LoRA first, ReFT first, and alternating, with the same number of epochs
    "layer_rank",  #: layers and ranks of stage 2
    "stage1_variants",  #: variants and initializations of LoRA in stage 1
    "stage2_variants",  #: kinds of interventions in stage 2
    "cross_task",  #: LoRA alone, ReFT alone and HEFT on several tasks
]
#: (name, method) of each arm.
Arms = list[tuple[str, dict[str, Any]]]

LONG, SHORT = 20, 3  #: the paper's epochs
_DEPTHS = (10 / 32, 15 / 32, 20 / 32)  #: the paper's layer 15 of 32, and layers around it
_RANKS = (2, 4, 8)
_PAPER = {
    "model": "meta-llama/Llama-2-7b-hf",
    "training_file": "hub:google/boolq:train",
    "test_file": "hub:google/boolq:validation",
}
_STAGE1: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "DoRA + PiSSA": {"use_dora": True, "init": "pissa"},
}


def defaults(preset: Preset | None) -> dict[str, str]:
    """Returns the preset's own model and files, if it has them."""
    return dict(_PAPER) if preset == "paper_table" else {}


def arms(preset: Preset, *, scale: float, layers: int | None) -> Arms:
    """Returns the arms, with epochs times `scale`. `layers`: the base model's number, if known. Raises
    InvalidRequest.
    """
    long, short = _scaled(LONG, scale), _scaled(SHORT, scale)
    match preset:
        case "paper_table":
            return _paper_table(long, short)
        case "equal_compute":
            return _equal_compute(short)
        case "order":
            return _order(short)
        case "layer_rank":
            return _layer_rank(short, layers)
        case "stage1_variants":
            return [(name, _heft(short, short, lora=changes)) for name, changes in _STAGE1.items()]
        case "stage2_variants":
            return [(kind, _heft(short, short, reft={"kind": kind})) for kind in stage2_kinds()]
        case "cross_task":
            return _cross_task(short)


def _scaled(epochs: int, scale: float) -> int:
    return max(1, round(epochs * scale))


def _paper_table(long: int, short: int) -> Arms:
    if long == short:
        raise InvalidRequest("the long and the short arms would be equal", param="epochs_scale")
    return [
        (f"LoRA alone {long}", {"type": "lora", "lora": {"n_epochs": long}}),
        (f"ReFT alone {long}", {"type": "reft", "reft": {"n_epochs": long}}),
        (f"HEFT {short}+{short}", _heft(short, short)),
        (f"HEFT {long}+{long}", _heft(long, long)),
    ]


def equal_compute_references(preset: Preset | None, names: list[str]) -> dict[str, str]:
    """Returns {arm: the arm whose compute it matches} (store.studies.equal_compute)."""
    return dict.fromkeys(names[1:], names[0]) if preset == "equal_compute" else {}


def _equal_compute(short: int) -> Arms:
    stage: dict[str, Any] = {"n_epochs": 1}  #: replaced once the compute of HEFT is measured
    return [
        (f"HEFT {short}+{short}", _heft(short, short)),
        ("LoRA alone", {"type": "lora", "lora": stage}),
        ("ReFT alone", {"type": "reft", "reft": stage}),
    ]


def _order(short: int) -> Arms:
    """Returns arms of equal numbers of epochs: the interleaved one has four stages of half as many each."""
    half = max(1, short // 2)
    epochs = 2 * half
    halves = {"lora": {"n_epochs": half}, "reft": {"n_epochs": half}}
    interleaved = {"type": "heft_interleaved", "heft_interleaved": halves}
    return [
        (f"HEFT {epochs}+{epochs}", _heft(epochs, epochs)),
        (f"reversed {epochs}+{epochs}", _heft(epochs, epochs, kind="heft_reversed")),
        ("interleaved " + "+".join([str(half)] * 4), interleaved),
    ]


def _layer_rank(short: int, layers: int | None) -> Arms:
    if layers is None:
        message = "layer_rank needs a base model that a worker offers; or use a grid over reft.layers instead"
        raise InvalidRequest(message, param="preset")
    chosen_layers = sorted({min(round(depth * layers), layers - 1) for depth in _DEPTHS})
    return [
        (f"layer {layer} rank {rank}", _heft(short, short, reft={"layers": [layer], "rank": rank}))
        for layer, rank in product(chosen_layers, _RANKS)
    ]


def _cross_task(short: int) -> Arms:
    """Returns arms of equal numbers of epochs: a stage alone has as many as HEFT's two stages together."""
    return [
        (f"LoRA alone {2 * short}", {"type": "lora", "lora": {"n_epochs": 2 * short}}),
        (f"ReFT alone {2 * short}", {"type": "reft", "reft": {"n_epochs": 2 * short}}),
        (f"HEFT {short}+{short}", _heft(short, short)),
    ]


def stage2_kinds() -> tuple[str, ...]:
    """Returns the kinds of interventions that the engine trains."""
    return get_args(ReftStage.model_fields["kind"].annotation)


def _heft(
    lora_epochs: int,
    reft_epochs: int,
    *,
    kind: str = "heft",
    lora: dict[str, Any] | None = None,
    reft: dict[str, Any] | None = None,
) -> dict[str, Any]:
    stages = {
        "lora": {"n_epochs": lora_epochs, **(lora or {})},
        "reft": {"n_epochs": reft_epochs, **(reft or {})},
    }
    return {"type": kind, kind: stages}
