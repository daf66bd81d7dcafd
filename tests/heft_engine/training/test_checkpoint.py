"""Checkpoints on disk are complete or absent, never rewritten, and refused by any other run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import REFT, RunRecord, but, config, parse, run, yes_no

from heft_engine.config.train import LoraStage
from heft_engine.errors import BundleError, Stopped
from heft_engine.runtime import sealed_directory
from heft_engine.runtime.sealed_directory import MANIFEST, load_state, prune, save_state, seal, verify


@pytest.fixture(scope="module")
def stopped(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the middle of the second stage."""
    folder = tmp_path_factory.mktemp("stopped")
    calls = itertools.count(1)
    record = RunRecord()
    with pytest.raises(Stopped):
        run(
            config(tiny_llama_dir),
            folder / "out",
            record=record,
            checkpoint_dir=folder / "checkpoints",
            should_stop=lambda: next(calls) == 10,
        )
    assert record.data("CHECKPOINT_SAVED")[-1]["stage"] == "reft"
    return Path(record.data("CHECKPOINT_SAVED")[-1]["path"])


def test_what_is_saved_is_what_is_loaded_random_state_and_all(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = {"a/b": torch.randn(3, 4), "scalar": torch.tensor(7.0), "half": torch.randn(2).bfloat16()}
    save_state(tmp_path / "one", {"step": 3, "loss": 0.1, "none": None}, tensors)
    drawn = torch.randn(5)
    values, loaded = load_state(tmp_path / "one")
    assert values == {"step": 3, "loss": 0.1, "none": None}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    torch.set_rng_state(loaded["rng"])
    assert torch.equal(torch.randn(5), drawn)


def _delete(path: Path) -> None:
    path.unlink()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_delete, _flip, _cut])
@pytest.mark.parametrize(
    "name", ["state.json", "state.safetensors", "stages/lora/adapter_model.safetensors", MANIFEST]
)
def test_a_damaged_checkpoint_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, stopped: Path, damage: Callable[[Path], None], name: str
) -> None:
    copy = shutil.copytree(stopped, tmp_path / "copy")
    verify(copy)
    damage(copy / name)
    with pytest.raises(BundleError, match=r"is (damaged|incomplete)"):
        run(config(tiny_llama_dir), tmp_path / "out", resume=copy)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"max_length": 256}, {"stages": [LoraStage(n_epochs=2), REFT]}, {"dtype": "bfloat16"}],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tiny_llama_dir: Path, tmp_path: Path, stopped: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BundleError, match="other settings"):
        run(config(tiny_llama_dir, **changes), tmp_path / "out", resume=stopped)


def test_a_checkpoint_of_other_rows_is_refused(tiny_llama_dir: Path, tmp_path: Path, stopped: Path) -> None:
    rows = parse(yes_no(24))
    rows[5], rows[6] = rows[6], rows[5]
    with pytest.raises(BundleError, match="other training rows"):
        run(config(tiny_llama_dir), tmp_path / "out", rows, resume=stopped)


def test_a_kill_between_files_and_manifest_leaves_no_checkpoint(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """An exception that no `except Exception` catches, like a signal."""

    sealed = itertools.count(1)

    def killed_at_the_second(directory: Path) -> dict[str, str]:
        if next(sealed) == 2:
            raise Killed
        return seal(directory)

    monkeypatch.setattr("heft_engine.training.checkpoint.seal", killed_at_the_second)
    folder = tmp_path / "checkpoints"
    with pytest.raises(Killed):
        run(config(tiny_llama_dir), tmp_path / "out", checkpoint_dir=folder, checkpoint_seconds=0)
    complete, partial = sorted(folder.iterdir())
    assert (partial / "state.safetensors").exists()
    verify(complete)
    with pytest.raises(BundleError, match="incomplete"):
        run(config(tiny_llama_dir), tmp_path / "out", resume=partial)
    # The next run clears it away.
    monkeypatch.undo()
    record = run(config(tiny_llama_dir), tmp_path / "out", checkpoint_dir=folder, resume=complete)
    assert all((path / MANIFEST).exists() for path in folder.iterdir())
    assert max(record.losses) == 12


def test_no_checkpoint_is_ever_rewritten_and_the_newest_are_kept(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Checkpoints are saved at every step and epoch end; a checkpoint named by an event exists and never changes."""
    folder, record = tmp_path / "checkpoints", RunRecord()
    kinds: list[str] = []

    class Checking(list[Any]):
        def append(self, event: Any) -> None:
            super().append(event)
            if event.code == "CHECKPOINT_SAVED":
                path = Path(event.data["path"])
                assert path not in {Path(e.data["path"]) for e in self[:-1] if e.code == "CHECKPOINT_SAVED"}
                verify(path)
                kinds.append(event.data["kind"])
                steps = [p for p in folder.iterdir() if p.name.endswith("-step")]
                assert len(steps) == min(2, kinds.count("step"))
                assert event.data["kind"] == "stage" or path in steps

    record.events = Checking()
    run(config(tiny_llama_dir), tmp_path / "out", record=record, checkpoint_dir=folder, checkpoint_seconds=0)
    # 3 steps and the end of an epoch, twice a stage; the end of a stage.
    assert kinds == (["step"] * 8 + ["stage"]) * 2
    stages = [data for data in record.data("CHECKPOINT_SAVED") if data["kind"] == "stage"]
    assert [(data["stage"], data["step"]) for data in stages] == [("lora", 6), ("reft", 12)]
    for data in stages:
        verify(Path(data["path"]))
        assert (Path(data["path"]) / "bundle" / "heft.json").exists()


def test_a_checkpoint_has_the_metrics_of_its_step(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Metrics have OpenAI's names; the validation loss appears when an epoch has ended."""
    folder = tmp_path / "checkpoints"
    record = run(
        config(tiny_llama_dir),
        tmp_path / "out",
        None,
        parse(yes_no(8, seed=1)),
        checkpoint_dir=folder,
        checkpoint_seconds=0,
    )
    epochs = [data["eval_loss"] for data in record.data("EPOCH_COMPLETE")]
    saved = [(data["stage"], data["metrics"]) for data in record.data("CHECKPOINT_SAVED")]
    assert all(metrics["train_loss"] == record.losses[metrics["step"]] for _, metrics in saved)
    # Three steps and the end of the epoch, twice; then the end of the stage.
    lora = [metrics.get("valid_loss") for stage, metrics in saved if stage == "lora"]
    assert lora == [None] * 3 + [epochs[0]] * 4 + [epochs[1]] * 2
    alone = run(config(tiny_llama_dir, "lora"), tmp_path / "alone", checkpoint_dir=folder)
    assert "valid_loss" not in alone.data("CHECKPOINT_SAVED")[-1]["metrics"]


def test_a_run_that_goes_back_keeps_what_it_writes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Older attempts left later steps in the same folder."""
    folder = tmp_path / "checkpoints"
    run(config(tiny_llama_dir), tmp_path / "one", checkpoint_dir=folder, checkpoint_seconds=0)
    after_lora = min(folder.glob("*-stage"))
    record = RunRecord()
    record.events = _StillThere()
    run(
        config(tiny_llama_dir),
        tmp_path / "two",
        record=record,
        checkpoint_dir=folder,
        checkpoint_seconds=0,
        resume=after_lora,
    )
    assert len(record.data("CHECKPOINT_SAVED")) == 9


class _StillThere(list[Any]):
    def append(self, event: Any) -> None:
        super().append(event)
        assert event.code != "CHECKPOINT_SAVED" or Path(event.data["path"]).is_dir()


def test_pruning_leaves_what_is_not_ours(tmp_path: Path) -> None:
    for name in (
        "photos",
        "00000001-0-0-step",
        "00000002-0-0-step",
        "00000003-0-0-step",
        "00000002-1-0-stage",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if name[-4:] == "step":
            seal(tmp_path / name)
    (tmp_path / "00000003-0-0-step" / MANIFEST).touch()
    prune(tmp_path, 1, sealed="????????-0-*-step", unsealed="????????-[01]-*-st*")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "00000003-0-0-step"}


def test_a_manifest_names_every_file_and_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_text("x")
    (tmp_path / "top").write_text("y")
    synced: list[bool] = []
    monkeypatch.setattr(sealed_directory.os, "fsync", lambda _: synced.append((tmp_path / MANIFEST).exists()))
    seal(tmp_path)
    assert set(json.loads((tmp_path / MANIFEST).read_text())) == {"deep/er/file", "top"}
    # Both files and the manifest's content are on the disk before the manifest has its name.
    assert synced == [False, False, False, True]
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "top", MANIFEST}


def test_a_stop_without_a_checkpoint_folder_still_stops(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(config(tiny_llama_dir, stages=[but(REFT)]), tmp_path / "out", should_stop=lambda: True)
    assert not (tmp_path / "out").exists()
