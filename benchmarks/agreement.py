"""Agreement of optimised training with plain training, and the time that a second job saves by reusing stage 1."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import heft
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import LoraStage, ReftStage, TrainConfig
from heft_engine.data.encoding import Example
from heft_engine.data.rows import Row
from heft_engine.events import Event
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import BaseModel, load_model
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.run import train
from heft_engine.training.stage_store import LocalStages


def losses(
    base: BaseModel, lora: LoraStage, reft: ReftStage, rows: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    """Returns the largest relative difference of step losses to plain training, by dtype and optimisation."""
    differences: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")

        def train_losses(
            stage: LoraStage | ReftStage,
            level: CacheLevel = CacheLevel.NONE,
            compiled: bool = False,
            dtype: torch.dtype = dtype,
        ) -> list[float]:
            lm = PackedLM(load_model(base, dtype=dtype, device="cpu", attention=IMPLEMENTATION))
            result: list[float] = heft.train(lm, stage, rows, level, compiled)["losses"]
            return result

        stage2, stage1 = train_losses(reft), train_losses(lora)
        differences[name] = {
            "steps": len(stage2),
            "stage 2, keys and values": _difference(train_losses(reft, CacheLevel.KV), stage2),
            "stage 2, hidden states only": _difference(train_losses(reft, CacheLevel.HIDDEN_STATES), stage2),
            "stage 1, layers compiled": _difference(train_losses(lora, compiled=True), stage1),
        }
    return differences


def _difference(losses: list[float], plain: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))


def reuse(model: str, lora: LoraStage, reft: ReftStage, rows: Sequence[Row]) -> dict[str, Any]:
    """Runs two jobs with the same stage 1 and different ranks in stage 2.

    Returns for each the seconds from its start to that of stage 2, and the steps that ran.
    """
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        for number, rank in enumerate((reft.rank, reft.rank * 2)):
            steps: list[str] = []
            marks: dict[str, float] = {}

            def listen(event: Event, steps: list[str] = steps, marks: dict[str, float] = marks) -> None:
                if event.code == "METRICS":
                    steps.append(event.data["stage"])
                elif event.code in ("STARTED", "STAGE_STARTED"):
                    marks[event.data.get("stage", "")] = time.perf_counter()

            stages = [lora, reft.model_copy(update={"rank": rank})]
            config = TrainConfig(model=model, stages=stages, method="heft")
            out = Path(folder) / str(number)
            train(config, rows, [], out, listen, stage_store=LocalStages(directory=Path(folder) / "stages"))
            jobs.append(
                {
                    "stage1_seconds": marks["reft"] - marks[""],
                    "lora_steps": steps.count("lora"),
                    "reft_steps": steps.count("reft"),
                }
            )
    return {"jobs": jobs}
