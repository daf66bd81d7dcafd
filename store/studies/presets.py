"""Studies that are ready-made: the arms of each, with the paper's values where it gives them.

Every setting that is not named here is on "auto" or at its default (docs/settings.md). It does NOT know the database.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, get_args

from heft_engine.config.train import ReftStage
from store.errors import InvalidRequest

Preset = Literal[
    "paper_table",  #: LoRA alone, ReFT alone, HEFT short, HEFT long: the paper's table
    "equal_compute",  #: HEFT, and each stage alone for as much arithmetic as HEFT has taken
    "order",  #: coarse to fine, fine to coarse, and in turns, at the same number of epochs
    "layer_rank",  #: where stage 2 acts, and how wide it is
    "stage1_variants",  #: what stage 1 trains, and where it begins
    "stage2_variants",  #: what stage 2 trains
    "cross_task",  #: LoRA alone, ReFT alone, HEFT, each on several tasks
]
Arms = list[tuple[str, dict[str, Any]]]

LONG, SHORT = 20, 3  #: the paper's epochs
_DEPTHS = (10 / 32, 15 / 32, 20 / 32)  #: the paper's layer 15 of 32, and around it
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
    """The model and the files that a preset brings along."""
    return dict(_PAPER) if preset == "paper_table" else {}


def arms(preset: Preset, *, scale: float, layers: int | None) -> Arms:
    """Names and methods. `layers`: of the base model, None when nobody knows. Raises InvalidRequest."""
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
        raise InvalidRequest("long and short arms would be the same", param="epochs_scale")
    return [
        (f"LoRA alone {long}", {"type": "lora", "lora": {"n_epochs": long}}),
        (f"ReFT alone {long}", {"type": "reft", "reft": {"n_epochs": long}}),
        (f"HEFT {short}+{short}", _heft(short, short)),
        (f"HEFT {long}+{long}", _heft(long, long)),
    ]


def likened(preset: Preset | None, names: list[str]) -> dict[str, str]:
    """Arms whose epochs are chosen once it is known what another has taken, and which that is
    (store.studies.equal_compute)."""
    return dict.fromkeys(names[1:], names[0]) if preset == "equal_compute" else {}


def _equal_compute(short: int) -> Arms:
    alone: dict[str, Any] = {"n_epochs": 1}  #: until it is known how many
    return [
        (f"HEFT {short}+{short}", _heft(short, short)),
        ("LoRA alone", {"type": "lora", "lora": alone}),
        ("ReFT alone", {"type": "reft", "reft": alone}),
    ]


def _order(short: int) -> Arms:
    """In turns there are four stages: each of half the epochs, so that every arm sees as many."""
    half = max(1, short // 2)
    whole = 2 * half
    turns = {"lora": {"n_epochs": half}, "reft": {"n_epochs": half}}
    return [
        (f"HEFT {whole}+{whole}", _heft(whole, whole)),
        (f"reversed {whole}+{whole}", _heft(whole, whole, kind="heft_reversed")),
        ("interleaved " + "+".join([str(half)] * 4), {"type": "heft_interleaved", "heft_interleaved": turns}),
    ]


def _layer_rank(short: int, layers: int | None) -> Arms:
    if layers is None:
        message = (
            "layer_rank needs a base model whose depth a worker has told; or give a grid over reft.layers"
        )
        raise InvalidRequest(message, param="preset")
    at = sorted({min(round(depth * layers), layers - 1) for depth in _DEPTHS})
    return [
        (f"layer {layer} rank {rank}", _heft(short, short, reft={"layers": [layer], "rank": rank}))
        for layer, rank in product(at, _RANKS)
    ]


def _cross_task(short: int) -> Arms:
    """What is trained alone sees as many rows as HEFT's two stages together."""
    return [
        (f"LoRA alone {2 * short}", {"type": "lora", "lora": {"n_epochs": 2 * short}}),
        (f"ReFT alone {2 * short}", {"type": "reft", "reft": {"n_epochs": 2 * short}}),
        (f"HEFT {short}+{short}", _heft(short, short)),
    ]


def stage2_kinds() -> tuple[str, ...]:
    """The interventions that the engine trains."""
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
