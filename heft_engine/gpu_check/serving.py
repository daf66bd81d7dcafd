"""The part `serving`: speed of scores and texts, and how often a step makes the host wait for the GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from heft_engine.gpu_check.part import Findings, Target
from heft_engine.gpu_check.shapes import random_examples
from heft_engine.gpu_check.stages import detach, lora_stage, random_lengths, stage_inputs
from heft_engine.inference.greedy import generate
from heft_engine.inference.scoring import score
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.forward_pass import FullPass, summed_loss

#: Of a scoring pass and of a training step.
_MOST_WAITS = {"scoring_pass": 1, "training_step": 2}


def check_serving(target: Target, findings: Findings) -> None:
    lm = target.lm
    rows = random_examples(random_lengths(26, target.size(156, 12)), lm.config.vocab_size)
    tokens = sum(len(row.prompt) for row in rows)
    findings.figures["scored_tokens"] = tokens
    findings.figures["scoring_tokens_per_second"] = round(tokens / target.seconds(lambda: score(lm, rows)))
    new_tokens = target.size(64, 4)
    for count in (1, 16):
        prompts = random_examples([target.size(128, 8)] * count, lm.config.vocab_size)
        seconds = target.seconds(
            lambda prompts=prompts, count=count: generate(  # type: ignore[misc]
                lm, prompts, eos_tokens=(), max_new_tokens=[new_tokens] * count
            ),
            repeats=1,
        )
        findings.figures[f"generated_tokens_per_second_{count}"] = round(count * new_tokens / seconds, 1)
    if target.device.type == "cuda":
        waits = {"scoring_pass": _waits(lambda: score(lm, rows)), "training_step": _training_waits(target)}
        findings.figures["waits"] = waits
        for name, most in _MOST_WAITS.items():
            findings.check(waits[name] <= most, f"a {name} waits {waits[name]} times; the limit is {most}")


def _training_waits(target: Target) -> int:
    inputs = stage_inputs(target.lm, lora_stage(target.lm), random_lengths(16, target.size(148, 12)))
    forward = FullPass(lm=target.lm, examples=inputs.examples)
    parameters = inputs.adapter.parameters().values()
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def step() -> None:
        loss = summed_loss(forward, SupervisedObjective(), range(16))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()

    try:
        step()
        return _waits(step)
    finally:
        detach(inputs)


def _waits(call: Callable[[], object]) -> int:
    """Returns how often torch waits for the GPU in a call."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
