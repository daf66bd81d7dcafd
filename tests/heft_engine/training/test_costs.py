"""Costs and row values that a run reports, and its operations against the count of torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, but, config, parse, run, yes_no
from small_runs import load_inputs, reft, yes_no_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.reft import ReftAdapter
from heft_engine.config.flops import CacheLevel, RowTokens, StageWork, stage_flops
from heft_engine.config.train import LoraStage
from heft_engine.evaluation.row_values import unpack_correctness
from heft_engine.model.packing import packed_length
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.training.costs import shape_of
from heft_engine.training.forward_pass import FullPass, summed_loss
from heft_engine.training.memory.cache_plan import CachePlan
from heft_engine.training.stage_store import LocalStages

TEST, EVAL = parse(yes_no(20, seed=9)), parse(yes_no(24, seed=10))


class Counted(TorchDispatchMode):
    """Counts the products with weights as torch does; attention is left out, because it runs padded here.

    torch's FlopCounterMode follows modules too, which nested gradients break.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def test_it_is_what_torch_counts_for_lora(tiny_llama_dir: Path) -> None:
    stage = LoraStage(n_epochs=1, batch_size=4, learning_rate=1e-3, target_modules=["q_proj", "v_proj"])
    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows())
    trainable = LoraAdapter.attach(inputs.lm, stage)
    forward = FullPass(lm=inputs.lm, examples=inputs.examples)
    adapter = sum(p.numel() for p in trainable.parameters().values())
    with Counted() as counted:
        summed_loss(forward, SupervisedObjective(), range(len(inputs.examples))).backward()
    work = StageWork(level=CacheLevel.NONE, first_layer=0, epochs=1, adapter=adapter)
    tokens = [
        RowTokens(total=packed_length(e), suffix=packed_length(e), supervised=e.supervised_tokens)
        for e in inputs.examples
    ]
    assert stage_flops(replace(shape_of(inputs.lm), width=0), tokens, work) == pytest.approx(
        counted.total, rel=0.1
    )


def test_it_is_what_torch_counts_for_reft_on_the_cache(tiny_llama_dir: Path) -> None:
    stage = reft(layers=[1], rank=2)
    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows())
    trainable = ReftAdapter.attach(inputs.lm, stage)
    boundary = trainable.boundary()
    plan = CachePlan(level=CacheLevel.KV, bytes=0)
    with Counted() as counted:
        forward = plan.open(inputs.lm, boundary, inputs.examples, None)
        for _ in range(6):
            summed_loss(forward, SupervisedObjective(), range(len(inputs.examples))).backward()
    work = StageWork(level=CacheLevel.KV, first_layer=boundary.layer, epochs=6)
    tokens = [
        RowTokens(
            total=packed_length(e),
            suffix=packed_length(e) - boundary.first_token(len(e.prompt)),
            supervised=e.supervised_tokens,
        )
        for e in inputs.examples
    ]
    assert stage_flops(replace(shape_of(inputs.lm), width=0), tokens, work) == pytest.approx(
        counted.total, rel=0.1
    )


def test_a_run_says_what_it_cost_and_what_was_right(tiny_llama_dir: Path, tmp_path: Path) -> None:
    store = LocalStages(directory=tmp_path / "stages")
    first = run(
        config(tiny_llama_dir, stages=[LORA, REFT]), tmp_path / "one", test_rows=TEST, stage_store=store
    )
    other = REFT.model_copy(update={"rank": 1})
    second = run(
        config(tiny_llama_dir, stages=[LORA, other]), tmp_path / "two", test_rows=TEST, stage_store=store
    )
    succeeded = first.one("SUCCEEDED")
    completed = first.data("STAGE_COMPLETE")
    assert [cost["flops"] for cost in succeeded["costs"]] == [stage["flops"] for stage in completed]
    assert [cost["tokens"] for cost in succeeded["costs"]] == [stage["tokens"] for stage in completed]
    assert all(cost["seconds"] > 0 and "reused" not in cost for cost in succeeded["costs"])
    assert [cost["epochs"] for cost in succeeded["costs"]] == [LORA.n_epochs, REFT.n_epochs]
    lora, reft = succeeded["costs"]
    assert lora["flops_once"] == 0 < reft["flops_once"] < reft["flops"]
    outcomes = succeeded["outcomes"]
    evaluated = first.data("EVALUATION")
    assert all("right" not in data for data in evaluated)
    right = [
        int(unpack_correctness(stage_result["right"], outcomes["n"]).sum())
        for stage_result in outcomes["results"]
    ]
    assert right == [data["correct"] for data in evaluated]
    assert (outcomes["n"], outcomes["split"]) == (20, "test")

    again = second.one("SUCCEEDED")
    assert again["outcomes"]["rows_sha256"] == outcomes["rows_sha256"]
    assert again["outcomes"]["results"][:2] == outcomes["results"][:2]
    assert again["costs"][0] == {**succeeded["costs"][0], "reused": True}
    assert "reused" not in again["costs"][1]


def test_a_run_says_what_it_came_to_on_validation_rows(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A search chooses by this result, never by that of the reported rows."""
    both = run(config(tiny_llama_dir, "lora"), tmp_path / "both", validation=EVAL, test_rows=TEST).one(
        "SUCCEEDED"
    )
    alone = run(config(tiny_llama_dir, "lora"), tmp_path / "alone", validation=EVAL).one("SUCCEEDED")
    validation = both["outcomes"]["validation"]
    assert (validation["n"], validation["metric"]) == (len(EVAL), "accuracy")
    assert validation["value"] == pytest.approx(alone["evaluation"]["results"][-1]["accuracy"])
    assert alone["outcomes"]["validation"] is None


def test_text_is_written_on_validation_rows_where_a_search_asks(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse([{"prompt": f"is it {n}", "completion": f" {n}"} for n in range(12)])
    splits = {"validation": rows[4:8], "test_rows": rows[8:]}
    stages = [but(LORA, n_epochs=1)]
    plain = run(config(tiny_llama_dir, "lora", stages), tmp_path / "plain", rows[:4], **splits)
    assert plain.one("SUCCEEDED")["outcomes"]["validation"] is None
    evaluated = run(
        config(tiny_llama_dir, "lora", stages),
        tmp_path / "asked",
        rows[:4],
        **splits,
        evaluate_validation=True,
    )
    validation = evaluated.one("SUCCEEDED")["outcomes"]["validation"]
    assert (validation["n"], validation["metric"]) == (4, "exact_match")
    assert validation["value"] in (0, 0.25, 0.5, 0.75, 1)


def test_a_run_without_rows_to_measure_on_has_no_outcomes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert run(config(tiny_llama_dir, "lora"), tmp_path / "one").one("SUCCEEDED")["outcomes"] is None
