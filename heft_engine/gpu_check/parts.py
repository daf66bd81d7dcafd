"""The parts of the check, in order, with their limits in seconds."""

from __future__ import annotations

from heft_engine.gpu_check.agreement import check_agreement
from heft_engine.gpu_check.attention import check_attention
from heft_engine.gpu_check.job import check_job
from heft_engine.gpu_check.machine import check_machine
from heft_engine.gpu_check.memory import check_memory
from heft_engine.gpu_check.part import Part
from heft_engine.gpu_check.serving import check_serving
from heft_engine.gpu_check.training import check_cache, check_training

PARTS = (
    Part(name="machine", title="Versions, products and copies", seconds=40, run=check_machine),
    Part(name="agreement", title="Every family, against the CPU in float32", seconds=60, run=check_agreement),
    Part(name="job", title="Runs that are stopped and resumed", seconds=60, run=check_job),
    Part(
        name="attention",
        title="One attention call a layer, against row by row",
        seconds=40,
        run=check_attention,
    ),
    Part(name="training", title="Stage 1: speed, and memory as planned", seconds=90, run=check_training),
    Part(name="cache", title="Stage 2 on each cache", seconds=60, run=check_cache),
    Part(name="serving", title="Scores and texts", seconds=60, run=check_serving),
    Part(name="memory", title="Capped memory", seconds=40, run=check_memory),
)
