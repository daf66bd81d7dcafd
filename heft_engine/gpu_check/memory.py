"""The part `memory`: under a cap, a plan holds; without a plan that fits, a stage goes on in smaller passes."""

from __future__ import annotations

import torch

from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.stages import detach, lora_stage, random_lengths, stage_inputs, train
from heft_engine.inference.scoring import score
from heft_engine.training.memory.cache_plan import CacheBudget
from heft_engine.training.plan import plan_stage
from heft_engine.training.stage_inputs import StageOptions

#: Bytes beside the model that the cap leaves.
_ROOM, _SMALL_ROOM = 3 << 30, 40 << 20


def check_memory(target: Target, findings: Findings) -> None:
    if target.device.type != "cuda":
        findings.figures["note"] = "a CPU's memory can't be capped"
        return
    lm, cap = target.lm, target.size(_ROOM, _SMALL_ROOM)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(target.device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, (torch.cuda.memory_allocated() + cap) / total), target.device
    )
    try:
        for name, room in (("planned", cap * 3 // 4), ("unplanned", total)):
            inputs = stage_inputs(lm, lora_stage(lm, batch_size=48), random_lengths(96, 150))
            try:
                options = StageOptions(cache=CacheBudget(memory=0), compile=False, memory_bytes=room)
                with plan_stage(inputs, options) as plan:
                    training = train(inputs, plan)
            finally:
                detach(inputs)
            findings.figures[name] = {"token_budget": plan.token_budget, "warnings": training.warnings}
            ran_out = "out_of_memory" in training.warnings
            findings.check(ran_out == (name == "unplanned"), f"{name}: warnings are {training.warnings}")
        findings.figures["scored_rows"] = len(score(lm, inputs.examples))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, target.device)
