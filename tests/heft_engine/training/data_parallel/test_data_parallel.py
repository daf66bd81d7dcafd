"""Two gloo processes that train one run, against one process: the same losses and weights, whatever is trained."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_processes.ranks import Run, forged_messages, run_in_ranks
from engine_runs import LORA, REFT, RunRecord, assert_equal, but, config, parse, run, tensors, yes_no
from small_runs import step_losses
from torch.testing._internal.distributed.fake_pg import FakeStore

from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import EarlyStopping, Stage, TrainConfig
from heft_engine.model.base_models import resolve_path
from heft_engine.runtime.distributed import Ranks
from heft_engine.runtime.messages import Authenticator, MessageChannel
from heft_engine.training.run import run_stages
from heft_engine.training.setup import load

#: Sums of float32 gradients in another order: seen were 7e-7 and 1.2e-7, of weights up to 0.8.
LOSS_BOUND, WEIGHT_BOUND = 1e-6, 1e-6
DROPOUT = {"dropout": 0.2}


def same_as_one_process(model: Path, start: Path) -> list[Run]:
    """Each kind of stage, on each level of the activation cache; the batches of 22 rows end with one of 6."""
    return [
        Run(name="lora", config=config(model, "lora")),
        Run(name="dora", config=config(model, "lora", [but(LORA, use_dora=True, init="pissa")])),
        Run(name="keys and values", config=config(model, "reft")),
        Run(
            name="hidden states", config=config(model, "reft", [but(REFT, positions="f1+l1", layers=[1, 2])])
        ),
        Run(name="no cache", config=config(model, "reft"), options={"cache_memory_bytes": 0}),
        Run(name="both stages", config=config(model, "heft")),
        Run(name="early stopping", config=stopped_early(model)),
        Run(name="one row a step", config=config(model, "heft", one_row_a_step()), rows=3),
        Run(name="going on", config=going_on(start)),
    ]


def stopped_early(model: Path) -> TrainConfig:
    stage = but(REFT, n_epochs=9, learning_rate=0.05)
    return config(model, "reft", [stage], early_stopping=EarlyStopping(patience=1))


def going_on(start: Path) -> TrainConfig:
    """A run from a fine-tuned model, stopped by answers that rank 0 alone scores."""
    stages = [but(LORA, n_epochs=1), but(REFT, n_epochs=6, learning_rate=0.05)]
    return config(start, "recipe", stages, early_stopping=EarlyStopping(patience=1, metric="valid_accuracy"))


def one_row_a_step() -> list[Stage]:
    return [but(LORA, batch_size=1), but(REFT, batch_size=1)]


def three_stages(model: Path) -> TrainConfig:
    return config(model, "recipe", [LORA, REFT, but(LORA, n_epochs=1)])


def with_dropout(model: Path) -> TrainConfig:
    return config(model, "heft", [but(LORA, **DROPOUT), but(REFT, **DROPOUT)])


def all_runs(model: Path, start: Path) -> list[Run]:
    dropout = with_dropout(model)
    return [
        *same_as_one_process(model, start),
        Run(name="stored", config=config(model, "heft"), reuses_stages=True),
        Run(name="reused", config=three_stages(model), reuses_stages=True),
        Run(name="out of memory", config=config(model, "lora"), out_of_memory=True),
        Run(name="float16", config=config(model, "lora", dtype="float16")),
        Run(name="overflow", config=config(model, "lora", dtype="float16"), overflows=True),
        Run(name="whole", config=dropout),
        # In the middle of an epoch of stage 1, then of stage 2.
        Run(name="first part", config=dropout, stop_after=1),
        Run(name="second part", config=dropout, stop_after=7, resume_from="first part"),
        Run(name="third part", config=dropout, resume_from="second part"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def start(tiny_llama_dir: Path, folder: Path) -> Path:
    """The bundle of a fine-tuned model."""
    run(config(tiny_llama_dir, "recipe", [but(REFT, n_epochs=1)]), folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def records(tiny_llama_dir: Path, folder: Path, start: Path) -> dict[str, list[RunRecord]]:
    """The records of two ranks, by the run's name."""
    return run_in_ranks(2, folder, all_runs(tiny_llama_dir, start))


@pytest.mark.parametrize("index", range(9))
def test_two_processes_have_the_losses_and_weights_of_one(
    tiny_llama_dir: Path, tmp_path: Path, start: Path, records: dict[str, list[RunRecord]], index: int
) -> None:
    single_run = same_as_one_process(tiny_llama_dir, start)[index]
    single = single_run.start(tmp_path)
    first, second = records[single_run.name]

    assert first.losses == pytest.approx(single.losses, abs=LOSS_BOUND)
    assert [epoch["eval_loss"] for epoch in first.data("EPOCH_COMPLETE")] == pytest.approx(
        [epoch["eval_loss"] for epoch in single.data("EPOCH_COMPLETE")], abs=LOSS_BOUND
    )
    levels = [[stage["cache"]["rung"] for stage in each.data("STAGE_STARTED")] for each in (first, single)]
    assert levels[0] == levels[1]
    theirs = tensors(first)
    for name, tensor in tensors(single).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=WEIGHT_BOUND)
    assert not second.events  # rank 0 alone tells
    assert second.bundle is not None
    assert first.bundle is not None
    assert second.bundle.info == first.bundle.info


def test_the_runs_above_cover_every_level_of_the_cache(records: dict[str, list[RunRecord]]) -> None:
    levels = {
        name: {stage["cache"]["rung"] for stage in first.data("STAGE_STARTED")}
        for name, (first, _) in records.items()
    }
    assert levels["keys and values"] == {"keys_values"}
    assert levels["hidden states"] == {"states"}
    assert levels["no cache"] == levels["lora"] == {"nothing"}
    assert levels["both stages"] == {"nothing", "keys_values"}


def test_ranks_that_are_stopped_and_resumed_were_never_stopped(records: dict[str, list[RunRecord]]) -> None:
    """Bit for bit, with dropout. One rank alone is asked to stop; both stop after that step."""
    whole, last = records["whole"][0], records["third part"][0]
    losses: dict[int, float] = {}
    for part in ("first part", "second part", "third part"):
        assert not losses.keys() & records[part][0].losses.keys(), "no step is done twice"
        losses |= records[part][0].losses
    assert list(records["first part"][0].losses) == [1]
    assert losses == whole.losses
    assert_equal(last, whole)


def test_all_ranks_go_on_from_stages_that_rank_0_finds_stored(records: dict[str, list[RunRecord]]) -> None:
    first, second = records["reused"]
    assert [stage["stage"] for stage in first.data("STAGE_REUSED")] == ["lora", "reft"]
    assert [stage["stage"] for stage in first.data("STAGE_STARTED")] == ["lora"]
    assert list(first.losses) == [13, 14, 15]
    assert second.bundle is not None
    assert len(second.bundle.adapters) == 2
    stored, reused = tensors(records["stored"][0]), tensors(first)
    assert all(torch.equal(reused[name], tensor) for name, tensor in stored.items())


def test_a_rank_that_runs_out_of_memory_goes_on_in_smaller_passes_of_its_own(
    records: dict[str, list[RunRecord]],
) -> None:
    first, _ = records["out of memory"]
    plain, _ = records["lora"]
    assert first.losses == pytest.approx(plain.losses, abs=LOSS_BOUND)
    assert first.losses != plain.losses
    assert not first.data("WARNING")


def test_all_ranks_take_a_step_again_whose_gradients_overflow_on_one(
    records: dict[str, list[RunRecord]],
) -> None:
    first, _ = records["overflow"]
    plain, _ = records["float16"]
    last, plain_last = first.data("METRICS")[-1], plain.data("METRICS")[-1]
    assert last["overflows"] == plain_last["overflows"] + 1
    assert last["loss_scale"] == plain_last["loss_scale"] / 2
    assert first.losses == pytest.approx(plain.losses, abs=2e-3)


def test_each_rank_has_dropout_masks_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path, records: dict[str, list[RunRecord]]
) -> None:
    single = Run(name="single", config=with_dropout(tiny_llama_dir)).start(tmp_path)
    assert records["whole"][0].losses != pytest.approx(single.losses, abs=LOSS_BOUND)
    assert records["whole"][0].losses == pytest.approx(single.losses, abs=0.5)


def test_one_process_continues_what_two_began(
    tiny_llama_dir: Path, tmp_path: Path, folder: Path, records: dict[str, list[RunRecord]]
) -> None:
    first, _ = records["both stages"]
    checkpoint = min((folder / "both stages-checkpoints").glob("*-step"))
    run = Run(name="rest", config=config(tiny_llama_dir, "heft"))
    rest = run.start(tmp_path, resume=checkpoint).losses
    assert rest == pytest.approx({step: first.losses[step] for step in rest}, abs=LOSS_BOUND)
    assert 0 < len(rest) < len(first.losses)


@pytest.mark.usefixtures("records")
def test_one_of_the_ranks_is_the_first_to_fail(folder: Path) -> None:
    assert len(list(folder.glob("first-failure-*"))) == 1


@pytest.mark.usefixtures("records")
def test_messages_that_rank_0_has_not_sealed_are_refused_unread(folder: Path) -> None:
    first, second = (pickle.loads((folder / f"forged-{rank}").read_bytes()) for rank in range(2))
    assert first == [None] * len(forged_messages(folder))
    assert second == ["forged_message"] * len(forged_messages(folder))
    assert not (folder / "was unpickled").exists()


class LonelyChannel(MessageChannel):
    """A channel in which every other rank sends the same as this one."""

    def send(self, payload: bytes) -> None:
        pass

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload] * self.size


def test_eight_ranks_exchange_one_flat_buffer_a_step(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's fake group, in which every exchange ends at once and nothing arrives."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    sizes: list[int] = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, **how: (sizes.append(t.numel()), all_reduce(t, **how)))
    events = []
    try:
        settings = config(tiny_llama_dir, "heft")
        channel = LonelyChannel(authenticator=Authenticator(secret="s" * 64), rank=0, size=8, group=None)
        ranks = Ranks(rank=0, size=8, local_size=8, _messages=channel)
        base = resolve_path(tiny_llama_dir)
        inputs = load(settings, base, parse(yes_no(20)), (), (), "cpu", ranks)
        run_stages(inputs, tmp_path / "out", events.append, RunOptions())
    finally:
        dist.destroy_process_group()
    trained = [e.data["trained_parameters"] for e in events if e.code == "STAGE_STARTED"]
    assert sizes == [trained[0] + 5] * 6 + [trained[1] + 5] * 6
    assert len(step_losses(events)) == 12
