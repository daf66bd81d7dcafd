"""Slots: one for each living worker, with an id and a folder; the files of dead workers are deleted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.scratch import acquire_slot, remove_older_than

HOLD = """
import sys, time
from pathlib import Path
from worker.scratch import acquire_slot
with acquire_slot(Path(sys.argv[1]), "train") as slot:
    (slot.folder / "rows.jsonl").write_text("{}")
    print(slot.worker_id, slot.folder, flush=True)
    time.sleep(1000)
"""


@contextmanager
def another_worker(root: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        worker_id, folder = process.stdout.readline().split(maxsplit=1)
        yield process, worker_id, Path(folder.strip())
        process.kill()


def test_a_folder_goes_with_its_worker(tmp_path: Path) -> None:
    with acquire_slot(tmp_path / "new" / "root", "train") as slot:
        (slot.folder / "job").mkdir()
        (slot.folder / "job" / "rows.jsonl").write_text("{}")
    assert not slot.folder.exists()


def test_living_workers_have_different_slots(tmp_path: Path) -> None:
    with another_worker(tmp_path) as (_, their_id, their_folder), acquire_slot(tmp_path, "train") as mine:
        assert mine.worker_id != their_id
        assert mine.folder != their_folder
        assert (their_folder / "rows.jsonl").exists()


def test_the_successor_of_a_killed_worker_has_its_id_and_none_of_its_files(tmp_path: Path) -> None:
    with another_worker(tmp_path) as (process, their_id, their_folder):
        process.kill()
        process.wait()
        with acquire_slot(tmp_path, "inference") as other:
            assert other.worker_id != their_id
            assert not their_folder.exists(), "any worker deletes them"
        with acquire_slot(tmp_path, "train") as successor:
            assert successor.worker_id == their_id
            assert list(successor.folder.iterdir()) == []


def test_ids_of_two_machines_differ(tmp_path: Path) -> None:
    with acquire_slot(tmp_path / "one", "train") as here, acquire_slot(tmp_path / "two", "train") as there:
        assert here.worker_id != there.worker_id


def test_folders_that_were_not_touched_for_long_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    remove_older_than(folder, 60)  # it does not exist yet
    for name, age in (("old", 120), ("new", 0)):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("{}")
        at = time.time() - age
        os.utime(folder / name, (at, at))
    remove_older_than(folder, 60)
    assert [path.name for path in folder.iterdir()] == ["new"]
