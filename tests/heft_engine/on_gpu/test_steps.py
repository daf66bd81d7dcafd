"""Steps and passes on a pretended GPU: nothing mixes devices, and the host waits once a step or pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from pretended_gpu.build import requires_pretended_gpu
from pretended_gpu.child import run_all
from pretended_gpu.gpu import Gpu
from pretended_gpu.machine import Machine
from pretended_gpu.models import tiny_lm
from tiny_models import FAMILIES
from torch.testing._internal.distributed.fake_pg import FakeStore

from heft_engine.adapters.adapter import Adapter
from heft_engine.adapters.registry import ADAPTERS
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import InterventionKind, LoraStage, ReftStage, Stage
from heft_engine.data.encoding import Example
from heft_engine.diagnostics import curvature, representations
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.sampling import SamplingParams
from heft_engine.inference.scoring import score
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.runtime.distributed import SINGLE_PROCESS, Ranks
from heft_engine.training.activation_cache import SuffixCache
from heft_engine.training.forward_pass import ForwardPass, FullPass, SuffixPass
from heft_engine.training.loop import Hooks, TrainLoop
from heft_engine.training.memory.low_memory_layers import low_memory_layers
from heft_engine.training.optimization.loss_scale import LossScale

pytestmark = requires_pretended_gpu


def rows(*lengths: int, answers: tuple[tuple[int, ...], ...] = ((7, 8),)) -> list[Example]:
    rng = random.Random(0)
    labels = tuple(map(str, range(len(answers))))
    return [
        Example(
            prompt=tuple(rng.randrange(5, 500) for _ in range(length)), answers=answers, labels=labels, gold=0
        )
        for length in lengths
    ]


def loop_of(adapter: Adapter, stage: Stage, forward: ForwardPass, ranks: Ranks = SINGLE_PROCESS) -> TrainLoop:
    return TrainLoop(
        stage=stage,
        index=0,
        seed=0,
        adapter=adapter,
        objective=SupervisedObjective(),
        forward=forward,
        validation=FullPass(lm=forward.lm, examples=rows(9, 30)),
        early_stopping=None,
        first_step=0,
        total_steps=2,
        ranks=ranks,
        hooks=Hooks(on_event=lambda _: None, save=lambda *_: None, should_stop=lambda: False),
    )


def trains(
    gpu: Gpu,
    stage: dict[str, Any],
    level: str = "nothing",
    ranks: Ranks = SINGLE_PROCESS,
    **model: Any,
) -> dict[str, Any]:
    """Two steps of a stage, of which the second is counted; then the end of an epoch, and a checkpoint restored."""
    lm = tiny_lm(**model)
    settings: Stage
    if stage["type"] == "lora":
        settings = LoraStage(**stage, target_modules=list(lm.family.attention))
    else:
        settings = ReftStage(**stage)
    adapter = ADAPTERS[settings.type].attach(lm, settings)
    examples = rows(40, 7, 33, 1)
    with low_memory_layers(lm):
        forward: ForwardPass = FullPass(lm=lm, examples=examples)
        if level != "nothing":
            cache = SuffixCache(lm, adapter.boundary(), examples, CacheLevel(level))
            forward = SuffixPass(cache=cache)
        loop = loop_of(adapter, settings, forward, ranks)
        loop.progress.token_budget = 48  # several micro-batches
        for _ in range(2):
            gpu.watch.clear()
            loop._train_step(range(4), 1e-3)
        waits = list(gpu.watch.synchronisations.elements())
        loop._validation_loss()
        loop.restore(loop.progress, loop._tensors())
        loop._train_step(range(4), 1e-3)
    places = {
        str(tensor.device) for state in loop.optimizer.adamw.state.values() for tensor in state.values()
    }
    return {"waits": waits, "places": sorted(places)}


def trains_in_float16(gpu: Gpu, **scenario: Any) -> dict[str, Any]:
    """The same in float16, where the scale of the loss is read after each step; a pretended one is never a number."""
    update = LossScale.update

    def counting_update(scale: LossScale) -> bool:
        update(scale)
        return True

    LossScale.update = counting_update  # type: ignore[method-assign]
    return trains(gpu, dtype=torch.float16, **scenario)


def trains_in_a_rank(gpu: Gpu, **scenario: Any) -> dict[str, Any]:
    """The same as rank 1 of two, which has the second GPU. The other rank never answers: torch's fake group."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        return trains(
            gpu, ranks=Ranks(rank=1, size=2, local_rank=1, local_size=2), device="cuda:1", **scenario
        )
    finally:
        dist.destroy_process_group()


def scores(gpu: Gpu, **model: Any) -> None:
    """Single labels and longer answers of different numbers, in one pass."""
    lm = tiny_lm(**model)
    examples = [
        *rows(40, 9, answers=((7,), (8,))),
        *rows(30, answers=((7,), (8,), (9,))),
        *rows(21, 5, answers=((7, 8), (9, 10, 11), (3,))),
    ]
    score(lm, examples)
    gpu.watch.clear()
    score(lm, examples)


def decodes(gpu: Gpu, **model: Any) -> dict[str, Any]:
    lm = tiny_lm(**model)
    batch = DecodeBatch(lm, budget_bytes=1 << 30)
    prompts = [example.prompt for example in rows(60, 5, 63, 30)]
    drawn = SamplingParams(temperature=0.7, top_p=0.9, top_logprobs=2, presence_penalty=0.1)
    batch.prefill(
        [
            DecodeRequest(
                id=index, prompt=prompt, max_tokens=70, sampling=drawn if index else SamplingParams()
            )
            for index, prompt in enumerate(prompts)
        ]
    )
    batch.remove(1)
    for _ in range(6):
        batch.decode()
    return {"sequences": len(batch)}


def diagnoses(gpu: Gpu, kind: str) -> None:
    """Curvature and representations. A descent's steps are those of training."""
    lm = tiny_lm("llama", dtype=torch.float32)
    intervention = curvature.new_intervention(kind, lm.hidden_size, rank=2, seed=0).to(lm.device)
    initial = curvature.InitialIntervention(layer=1, positions="l1", intervention=intervention)
    examples = rows(9, 30, 5)
    curvature.curvature(lm, initial, examples, seed=0, steps=2, probes=2)
    states = representations.states(lm, examples, layer=1, positions="l1")
    assert states.device.type == "cpu"


LORA = {"type": "lora", "learning_rate": 1e-3}
REFT = {"type": "reft", "learning_rate": 1e-3, "layers": [1], "positions": "l2"}
LEVELS = ("nothing", "states", "keys_values")


def scenarios(
    loras: Sequence[dict[str, Any]], refts: Sequence[dict[str, Any]], **model: Any
) -> list[partial[Any]]:
    """A model's stages, on every level of the cache; its scores; its texts."""
    stages = [partial(trains, stage=LORA | changes, **model) for changes in loras]
    stages += [
        partial(trains, stage=REFT | changes, level=level, **model) for changes in refts for level in LEVELS
    ]
    return [*stages, partial(scores, **model), partial(decodes, **model)]


def check(all_scenarios: list[Any], seconds: float, gpus: int = 1) -> None:
    reports = run_all(all_scenarios, Machine(gpus=gpus), seconds=seconds)
    for scenario, report in zip(all_scenarios, reports, strict=True):
        name = f"{scenario.func.__name__} {scenario.keywords}"
        assert not report.error, f"{name}\n{report.error}"
        assert report.mixed == {}, name
        if scenario.func is trains:
            # To read the loss. The optimizer's state is on the GPU, after a resume too.
            assert len(report.values["waits"]) == 1, (name, report.values["waits"])
            assert set(report.values["places"]) <= {f"cuda:{index}" for index in range(gpus)}, name
        if scenario.func is trains_in_float16:
            assert len(report.values["waits"]) == 2, (name, report.values["waits"])
            assert report.values["places"] == ["cuda:0"], name
        if scenario.func is trains_in_a_rank:
            assert len(report.values["waits"]) == 1, (name, report.values["waits"])
            assert report.values["places"] == ["cuda:1"], name
        if scenario.func is scores:
            assert sum(report.synchronisations.values()) == 1, (name, report.synchronisations)
        if scenario.func is decodes:
            assert report.values == {"sequences": 3}, name


def test_a_step_and_a_scoring_pass_wait_for_the_gpu_once() -> None:
    """Also in the second of two processes, which stays on its own GPU."""
    stages = [(LORA | {"dropout": 0.1}, "nothing"), *((REFT, level) for level in LEVELS)]
    ranks = [partial(trains_in_a_rank, stage=stage, level=level, family="llama") for stage, level in stages]
    halves = [
        partial(trains_in_float16, stage=stage, level=level, family="llama")
        for stage, level in (stages[0], stages[-1])
    ]
    check([*scenarios([{}], [{}], family="llama"), *ranks, *halves], 200, gpus=2)


def test_a_diagnosis_runs_on_a_gpu() -> None:
    check([partial(diagnoses, kind=kind) for kind in ("loreft", "direft")], 200)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_variant_runs_on_one_gpu(family: str) -> None:
    loras = [
        *({}, {"use_dora": True}, {"init": "pissa"}, {"init": "pissa_niter_4", "use_dora": True}),
        *({"init": "olora"}, {"dropout": 0.1}, {"layers": [2, 3]}),
    ]
    refts = [
        {"kind": kind, "positions": positions, "dropout": 0.1}
        for kind in get_args(InterventionKind)
        for positions in ("l1", "f1+l2")
    ]
    check(scenarios(loras, refts, family=family), 1_200)


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_spread_over_gpus(family: str, gpus: int) -> None:
    """Its head alone, or with the embedding that it is tied to."""
    models = [{"family": family, "gpus": gpus, "tie_word_embeddings": tied} for tied in (True, False)]
    check([scenario for model in models for scenario in scenarios([{}], [{}], **model)], 600, gpus)
