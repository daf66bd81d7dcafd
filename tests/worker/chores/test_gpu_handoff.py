"""A trainer requests its GPU; the inference worker there evicts its models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from worker_bench import Bench

from store.db.states import JobState
from worker.celery_app import Role
from worker.chores.chore import run_chores
from worker.chores.gpu_handoff import gpu_requested, handoff_chores
from worker.chores.presence import registered
from worker.context import Context


class Pool:
    """A model pool that counts its evictions."""

    def __init__(self) -> None:
        self.bytes, self.evictions = 100, 0

    def evict_idle(self) -> None:
        self.bytes, self.evictions = 0, self.evictions + 1


def on_device(bench: Bench, worker_id: str, device: str | None) -> Context:
    return replace(bench.context, worker_id=worker_id, device=device)


def serve(stack: ExitStack, context: Context, pool: Pool) -> None:
    stack.enter_context(registered(context, Role.INFERENCE))
    stack.enter_context(run_chores(handoff_chores(context, pool.evict_idle)))


def test_models_on_the_same_gpu_are_evicted_before_training(bench: Bench) -> None:
    here, elsewhere = Pool(), Pool()
    trainer = on_device(bench, "train-1", "host/0")
    with ExitStack() as stack:
        serve(stack, on_device(bench, "inference-1", "host/0"), here)
        serve(stack, on_device(bench, "inference-2", "host/1"), elsewhere)
        stack.enter_context(registered(trainer, Role.TRAIN))
        with gpu_requested(trainer, "job/1"):
            assert (here.bytes, elsewhere.bytes) == (0, 100)
            here.bytes = 50  # loaded again in the meantime
        with gpu_requested(trainer, "job/2"):
            assert here.bytes == 0
        assert (here.evictions, elsewhere.evictions) == (2, 0), "once for each request"


def test_without_a_gpu_nothing_is_requested(bench: Bench) -> None:
    assert handoff_chores(bench.context, lambda: None) == []
    with gpu_requested(bench.context, "job/1"):
        pass
    job_id = bench.queued([{"do": "metrics", "step": 1}])
    assert bench.run(job_id).state == JobState.SUCCEEDED
