"""Scratch folders: one for each living worker, and none of the dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from worker.scratch import scratch_folder

HOLD = """
import sys, time
from pathlib import Path
from worker.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "rows.jsonl").write_text("{}")
    print(folder, flush=True)
    time.sleep(1000)
"""


def test_it_goes_with_its_worker(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "new" / "root") as folder:
        (folder / "job").mkdir()
        (folder / "job" / "rows.jsonl").write_text("{}")
    assert not folder.exists()


def test_the_next_worker_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with scratch_folder(tmp_path) as mine:
            assert (theirs / "rows.jsonl").exists()
            assert mine != theirs
        other.kill()
        other.wait()
        with scratch_folder(tmp_path):
            assert not theirs.exists()
