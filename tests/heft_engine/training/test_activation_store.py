"""Activations that an earlier run stored are reused: same bits, no computation; never those of another owner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LORA, REFT, RunRecord, but, config, parse, run, tensors, yes_no

from heft_engine.config.train import ReftStage, TrainConfig
from heft_engine.data.rows import Row
from heft_engine.errors import Stopped
from heft_engine.runtime.sealed_directory import seal
from heft_engine.training import activation_cache, plan
from heft_engine.training.activation_store import ActivationStore
from heft_engine.training.stage_store import LocalStages

VALIDATION = parse(yes_no(6, seed=3))


@pytest.fixture
def folder(tmp_path: Path) -> ActivationStore:
    return ActivationStore(directory=tmp_path / "prefills")


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yields the number of rows of every prefill computed inside the block."""
    rows: list[int] = []
    fill = activation_cache.SuffixCache._fill

    def prefill(self: Any, examples: Any, *more: Any) -> None:
        rows.append(len(examples))
        fill(self, examples, *more)

    with monkeypatch.context() as patch:
        patch.setattr(activation_cache.SuffixCache, "_fill", prefill)
        yield rows


def heft(directory: Path, reft: ReftStage) -> TrainConfig:
    return config(directory, stages=[LORA, reft])


def plain(settings: TrainConfig, out: Path) -> RunRecord:
    return run(settings, out, None, VALIDATION)


def train(
    settings: TrainConfig, out: Path, prefills: ActivationStore, rows: list[Row] | None = None
) -> RunRecord:
    store = LocalStages(directory=out.parent / "stages")
    return run(settings, out, rows, VALIDATION, stage_store=store, activations=prefills)


def same(actual: RunRecord, expected: RunRecord) -> None:
    mine, theirs = tensors(actual), tensors(expected)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    reft = {step: loss for step, loss in expected.losses.items() if step > 6}
    assert {step: loss for step, loss in actual.losses.items() if step > 6} == reft


@pytest.mark.parametrize(
    "other",
    [
        but(REFT, rank=3),
        but(REFT, layers=[2]),
        but(REFT, layers=[1, 2]),
        but(REFT, layers=[1, 2], dropout=0.3),
        but(REFT, kind="direft"),
    ],
    ids=["rank", "higher", "two-layers", "dropout", "kind"],
)
def test_an_arm_takes_over_what_another_has_computed(
    tiny_llama_dir: Path,
    tmp_path: Path,
    folder: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
    other: ReftStage,
) -> None:
    first = but(REFT, layers=[1])
    train(heft(tiny_llama_dir, first), tmp_path / "first", folder)
    with counting(monkeypatch) as computed:
        second = train(heft(tiny_llama_dir, other), tmp_path / "second", folder)
    assert computed == []
    alone = plain(heft(tiny_llama_dir, other), tmp_path / "plain")
    same(second, alone)
    cost, plain_cost = second.data("STAGE_COMPLETE")[-1], alone.data("STAGE_COMPLETE")[-1]
    assert cost["flops"] == plain_cost["flops"], "counted as when it was computed"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (but(REFT, layers=[2]), but(REFT, layers=[1])),  # further down
        (but(REFT, layers=[1, 2]), but(REFT, layers=[2])),  # states in between were another stage's
        (but(REFT, layers=[1]), but(REFT, layers=[1], positions="l2")),
    ],
    ids=["lower", "above-two", "positions"],
)
def test_what_does_not_fit_is_computed(
    tiny_llama_dir: Path,
    tmp_path: Path,
    folder: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
    first: ReftStage,
    second: ReftStage,
) -> None:
    train(heft(tiny_llama_dir, first), tmp_path / "first", folder)
    with counting(monkeypatch) as computed:
        record = train(heft(tiny_llama_dir, second), tmp_path / "second", folder)
    assert sum(computed) > len(VALIDATION)
    same(record, plain(heft(tiny_llama_dir, second), tmp_path / "plain"))


def test_another_owner_another_seed_and_other_rows_find_nothing(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = heft(tiny_llama_dir, REFT)
    train(settings, tmp_path / "first", folder)
    stranger = ActivationStore(directory=folder.directory, owner="another")
    rows = parse(yes_no(12, seed=9))
    cases: list[tuple[TrainConfig, ActivationStore, list[Row] | None]] = [
        (heft(tiny_llama_dir, but(REFT, rank=3)), stranger, None),
        (settings.model_copy(update={"seed": 77}), folder, None),
        (settings, folder, rows),
    ]
    for index, (other, prefills, trained_on) in enumerate(cases):
        with counting(monkeypatch) as computed:
            train(other, tmp_path / f"other-{index}", prefills, trained_on)
        assert computed, f"case {index}"


def test_reft_alone_shares_its_prefill_among_seeds(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_llama_dir, "reft", stages=[REFT])
    train(settings, tmp_path / "first", folder)
    with counting(monkeypatch) as computed:
        train(settings.model_copy(update={"seed": 5}), tmp_path / "second", folder)
    assert computed == []


def test_a_damaged_one_and_one_that_is_too_large_cost_time_alone(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = heft(tiny_llama_dir, REFT)
    small = ActivationStore(directory=tmp_path / "small", max_bytes=1_000)
    train(settings, tmp_path / "first", small)
    assert not small.directory.exists()
    train(heft(tiny_llama_dir, but(REFT, rank=1)), tmp_path / "second", folder)
    for file in folder.directory.glob("*/states.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    with counting(monkeypatch) as computed:
        record = train(heft(tiny_llama_dir, but(REFT, rank=3)), tmp_path / "third", folder)
    assert computed
    same(record, plain(heft(tiny_llama_dir, but(REFT, rank=3)), tmp_path / "plain"))


def test_one_is_kept_where_it_pays_and_none_as_good_is_there(folder: ActivationStore) -> None:
    entries = folder.for_key("key")
    states, keys_values = [torch.full((4, 2), float(depth)) for depth in range(3)], torch.zeros(6)

    def keep(depths: int, seconds: float) -> None:
        entries.put(2, states[:depths], keys_values, seconds)

    def reaches(layer: int) -> bool:
        return entries.find(layer, 4, 2, torch.float32) is not None

    keep(2, seconds=1e-7)  # 88 bytes
    assert not reaches(2), "computing it again is quicker than any disk"
    keep(2, seconds=1.0)
    assert [reaches(layer) for layer in (1, 2, 3, 4)] == [False, True, True, False]
    keep(1, seconds=1.0)
    assert reaches(3), "the deeper one stays"
    keep(3, seconds=1.0)
    entry = entries.find(4, 4, 2, torch.float32)
    assert entry is not None
    assert torch.equal(entry.states[4 - entry.first], states[2])


def test_what_was_taken_over_counts_as_if_it_had_been_computed(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore
) -> None:
    train(heft(tiny_llama_dir, REFT), tmp_path / "first", folder)
    for about in folder.directory.glob("*/prefill.json"):
        about.write_text(json.dumps({**json.loads(about.read_text()), "seconds": 1_000.0}))
        seal(about.parent)
    record = train(heft(tiny_llama_dir, but(REFT, rank=3)), tmp_path / "second", folder)
    assert record.one("SUCCEEDED")["costs"][-1]["seconds"] > 2_000, "of training and validation rows"


def test_another_result_of_an_equal_stage_has_prefills_of_its_own(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of passes changes a stage's bits, with dropout even more, but not its key."""
    settings = config(tiny_llama_dir, stages=[but(LORA, dropout=0.1), REFT])
    run(settings, tmp_path / "first", stage_store=LocalStages(directory=tmp_path / "one"), activations=folder)
    monkeypatch.setattr(plan, "TOKEN_BUDGET", 100)
    alone = run(settings, tmp_path / "plain")
    with counting(monkeypatch) as computed:
        store = LocalStages(directory=tmp_path / "two")
        second = run(settings, tmp_path / "second", stage_store=store, activations=folder)
    assert computed
    same(second, alone)


def test_a_run_that_was_killed_finds_its_own(
    tiny_llama_dir: Path, tmp_path: Path, folder: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = heft(tiny_llama_dir, but(REFT, layers=[1, 2], dropout=0.3))
    stopped = iter([False] * 8 + [True] * 99)  # behind the first step of stage 2
    store = LocalStages(directory=tmp_path / "stages")
    checkpoints = tmp_path / "checkpoints"
    options: dict[str, Any] = {"stage_store": store, "activations": folder, "checkpoint_dir": checkpoints}
    with pytest.raises(Stopped):
        run(settings, tmp_path / "first", should_stop=lambda: next(stopped), **options)
    (path,) = checkpoints.glob("*7-0-*")
    with counting(monkeypatch) as computed:
        again = run(settings, tmp_path / "again", resume=path, **options)
    assert computed == []
    mine, theirs = tensors(again), tensors(run(settings, tmp_path / "plain"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
