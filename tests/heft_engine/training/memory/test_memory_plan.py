"""The memory of a stage is estimated before it starts, and its passes are cut to fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_runs import LORA, REFT, but, config, parse, run, yes_no

from benchmarks.single_stage import single_stage
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.model import loss as supervised
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM
from heft_engine.objectives.supervised import SupervisedObjective
from heft_engine.runtime import devices
from heft_engine.training import compile, schedule
from heft_engine.training import plan as stage_plan
from heft_engine.training.forward_pass import FullPass, summed_loss
from heft_engine.training.memory import memory_plan
from heft_engine.training.memory.cache_plan import CacheBudget
from heft_engine.training.memory.memory_plan import Fit, Footprint
from heft_engine.training.plan import plan_stage

FOOTPRINT = Footprint(fixed=1_000, per_token=100, per_square=2)


def packed(path: Path) -> PackedLM:
    return PackedLM(load_model(resolve_path(path), dtype=torch.float32, attention=IMPLEMENTATION))


def saved_bytes(lm: PackedLM, lengths: list[int]) -> int:
    """Returns the bytes of the storages that a pass saves for its gradient."""
    storages: dict[int, torch.Tensor] = {}
    weight_storages = {tensor.untyped_storage().data_ptr() for tensor in lm.model.state_dict().values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weight_storages:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = [Example(prompt=(7,) * n, answers=((9,),), labels=("",), gold=0) for n in lengths]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed_loss(FullPass(lm=lm, examples=rows), SupervisedObjective(), range(len(rows)))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_keeps_what_was_foretold(tiny_llama_dir: Path, checkpointing: bool) -> None:
    """The footprint measured on passes of at most 128 tokens holds for rows of 400."""
    lm = packed(tiny_llama_dir)
    LoraAdapter.attach(lm, but(LORA, target_modules=["q_proj", "v_proj"]))
    lm.checkpointing = checkpointing
    footprint = memory_plan.footprint(lm)
    for lengths in ([400], [300, 100, 50], [64] * 6):
        assert footprint.of(lengths) == pytest.approx(saved_bytes(lm, lengths), rel=0.1)


def test_layers_that_run_twice_keep_less(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    LoraAdapter.attach(lm, but(LORA, target_modules=["q_proj", "v_proj"]))
    usual = saved_bytes(lm, [200])
    lm.checkpointing = True
    assert saved_bytes(lm, [200]) < usual / 5


def test_the_largest_pass_that_fits_is_taken() -> None:
    def fit(room: float, frugal: float = 10.0) -> Fit:
        less = Footprint(fixed=0, per_token=frugal, per_square=0)
        return memory_plan.fit(
            room,
            1_024,
            lambda footprint, budget: footprint.of([100] * max(1, budget // 100)),
            100,
            lambda checkpointing: less if checkpointing else FOOTPRINT,
            "lora",
        )

    assert fit(1e9) == Fit(token_budget=1_024, checkpointing=False, bytes=1_000 + 100_000 + 2 * 10 * 128**2)
    halved = fit(200_000)
    assert (halved.token_budget, halved.checkpointing) == (256, False)
    assert fit(20_000) == Fit(token_budget=1_024, checkpointing=True, bytes=10_000)
    with pytest.raises(
        TrainingError, match=r"max_length 80 would fit\. batch_size does not matter"
    ) as failed:
        fit(8_000, frugal=100.0)
    assert (failed.value.code, failed.value.param) == ("out_of_memory", "max_length")
    with pytest.raises(TrainingError, match="a smaller model or a machine with more memory"):
        fit(10.0, frugal=100.0)


def test_a_run_cuts_its_passes_to_what_it_may_take(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = parse(yes_no(16))
    whole = run(config(tiny_llama_dir, "lora"), tmp_path / "whole", rows)
    plan = whole.data("STAGE_STARTED")[0]
    assert plan["memory_bytes"] > 0
    assert not plan["checkpointing"]
    assert whole.data("STAGE_COMPLETE")[0]["memory_bytes"] > 0

    room = 2_000_000
    tight = run(config(tiny_llama_dir, "lora"), tmp_path / "tight", rows, memory_bytes=room)
    assert tight.data("STAGE_STARTED")[0]["token_budget"] < plan["token_budget"]
    assert list(tight.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-5)

    with pytest.raises(TrainingError, match="stage lora needs"):
        run(config(tiny_llama_dir, "lora"), tmp_path / "none", rows, memory_bytes=200_000)


def test_what_a_compiler_raises_costs_speed_alone(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such header")

    settings = config(tiny_llama_dir, "heft")
    plain = run(settings, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    record = run(settings.model_copy(update={"compile": True}), tmp_path / "out")
    (warning,) = [event for event in record.events if event.data.get("signature") == "not_compiled"]
    assert "no such header" in warning.message
    assert [plan["compiled"] for plan in record.data("STAGE_STARTED")] == [False, False]
    assert record.losses == plain.losses


def test_only_long_stages_are_compiled(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    enough = int(compile.WORTH / 4 / lm.parameters) + 1
    assert compile.pays(lm, enough) == compile.can_compile()
    assert not compile.pays(lm, enough // 2)


def test_the_loss_of_many_tokens_is_the_sum_of_its_chunks(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = packed(tiny_llama_dir)
    torch.manual_seed(0)
    hidden = torch.randn(50, lm.hidden_size)
    targets = torch.randint(0, 600, (50,)).tolist()

    def chunked(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(supervised, "CHUNK", chunk)
        states = hidden.clone().requires_grad_()
        loss = supervised.cross_entropy(lm, states, targets).loss
        (loss / 50).backward()  # type: ignore[no-untyped-call]
        assert states.grad is not None
        return loss.detach(), states.grad

    states = hidden.clone().requires_grad_()
    plain = F.cross_entropy(lm.logits(states), torch.tensor(targets), reduction="sum")
    (plain / 50).backward()  # type: ignore[no-untyped-call]
    for chunk in (7, 50, 256):
        loss, gradient = chunked(chunk)
        torch.testing.assert_close(loss, plain.detach())
        torch.testing.assert_close(gradient, states.grad)
    with torch.no_grad():
        torch.testing.assert_close(supervised.cross_entropy(lm, hidden, targets).loss, plain.detach())


def test_a_reft_stage_foretells_its_cache(tiny_llama_dir: Path, tmp_path: Path) -> None:
    record = run(config(tiny_llama_dir, "reft", [but(REFT)]), tmp_path / "out")
    plan = record.one("STAGE_STARTED")
    assert plan["cache"]["rung"] == "keys_values"
    assert plan["memory_bytes"] > plan["cache"]["bytes"]


def test_many_epochs_are_not_all_counted_out(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def counting(seed: int, index: int, epoch: int, rows: int) -> list[int]:
        counted.append(epoch)
        return schedule.epoch_order(seed, index, epoch, rows)

    monkeypatch.setattr(stage_plan, "epoch_order", counting)
    monkeypatch.setattr(stage_plan, "COUNTED_ROWS", 40)
    run(config(tiny_llama_dir, "lora", [but(LORA, n_epochs=5)]), tmp_path / "out", parse(yes_no(16)))
    assert set(counted) == {0, 1}


def test_a_resumed_stage_is_estimated_by_the_passes_of_its_checkpoint(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resident_bytes", lambda device: 0)
    monkeypatch.setattr(stage_plan, "SCORING_BUDGET", 1)
    lm = packed(tiny_llama_dir)
    rows = [Example(prompt=(7,) * 200, answers=((9,),), labels=("",), gold=0)] * 16
    stage = but(LORA, target_modules=["q_proj", "v_proj"])
    with single_stage(lm, stage, rows, lambda event: None) as single:
        began = single.plan
    inputs, options, earlier = single.inputs, single.options, began.as_progress
    with plan_stage(inputs, options, earlier) as resumed:
        assert resumed == began
    with plan_stage(inputs, options, replace(earlier, token_budget=200)) as smaller:
        assert smaller.memory_bytes < 0.6 * began.memory_bytes


def test_trainers_of_one_machine_share_what_is_free(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"bytes": 10**12}
    monkeypatch.setattr(devices, "free_bytes", lambda device: free["bytes"])
    monkeypatch.setattr(devices, "_training_bytes", lambda: 0)
    rows = [Example(prompt=(7,) * 200, answers=((9,),), labels=("",), gold=0)] * 16
    stage = but(LORA, target_modules=["q_proj", "v_proj"])
    with single_stage(packed(tiny_llama_dir), stage, rows, lambda event: None) as single:
        inputs, options = single.inputs, single.options

    def fits(sharers: int) -> bool:
        try:
            with plan_stage(inputs, replace(options, cache=CacheBudget(sharers=sharers))):
                return True
        except TrainingError:
            return False

    for power in range(15, 40):
        free["bytes"] = 2**power
        if fits(1):
            break
    assert not fits(4)
    free["bytes"] *= 4
    assert fits(4)
    free["bytes"] = 3_200
    assert [CacheBudget(sharers=sharers).memory_bytes() for sharers in (1, 8)] == [800, 100]


def test_who_comes_late_does_not_share_what_is_left_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, shares = torch.device("cpu"), []
    for free, trainers, resident in (
        (1_600, 20, 10),  # alone so far
        (800, 820, 10),  # behind one that has filled its half
        (800, 20, 10),  # somebody else holds half: two that begin together get no more than there is
        (300, 1_300, 10),  # behind one that holds more than its part
    ):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        monkeypatch.setattr(devices, "_training_bytes", lambda trainers=trainers: trainers)
        monkeypatch.setattr(devices, "resident_bytes", lambda device, resident=resident: resident)
        shares.append(devices.memory_share(cpu, 2))
        assert devices.memory_share(cpu, 1) == free
    assert shares == [800, 800, 400, 300]


def test_runs_that_train_are_known_by_their_command() -> None:
    program = "import sys; block = bytearray(b'x' * 300_000_000); print(flush=True); sys.stdin.read()"
    before = devices._training_bytes()
    words = [sys.executable, "-c", program, "heft_engine", "train"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        assert devices._training_bytes() - before > 200_000_000
        other.stdin.close()


def test_what_a_stage_held_is_none_of_the_holes_that_an_earlier_one_left() -> None:
    cpu = torch.device("cpu")
    blocks = [bytearray(b"x" * 65_536) for _ in range(4_000)]
    del blocks[:-1]  # the last one keeps the heap from shrinking
    before = devices.resident_bytes(cpu)
    with memory_plan.peak(cpu) as most:
        stage_peak = most()
    assert stage_peak is not None
    assert stage_peak < before - 150_000_000


def test_a_merge_is_estimated_with_its_float32_passes_over_the_probe_rows(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With long rows, a merge takes more memory than any pass of its stage."""
    huge, plain = 10**10, memory_plan.pass_bytes

    def estimated(lm: PackedLM, tokens: int) -> int:
        return plain(lm, tokens) if tokens == stage_plan.SCORING_BUDGET else huge

    rows, estimates = parse(yes_no(8)), {}
    for name, method in (("merged", "lora"), ("not merged", "reft")):
        monkeypatch.setattr(memory_plan, "pass_bytes", estimated)
        started = run(config(tiny_llama_dir, method), tmp_path / name, rows).data("STAGE_STARTED")
        estimates[name] = started[0]["memory_bytes"]
    assert estimates["merged"] > huge > estimates["not merged"]
