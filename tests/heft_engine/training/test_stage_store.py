"""The folder of stages: whole entries alone are found, the least recently used ones go first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from heft_engine.training.stage_store import LocalStages


def put(store: LocalStages, key: str, size: int, age: float = 0.0) -> None:
    store.put(key, lambda path: (path / "file").write_bytes(b"x" * size) and None)
    if age and (store.directory / key).exists():
        used = (store.directory / key).stat().st_mtime - age
        os.utime(store.directory / key, (used, used))


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    store = LocalStages(directory=tmp_path / "stages", max_bytes=3_600)
    for age, key in ((30, "a"), (20, "b"), (10, "c")):
        put(store, key, 1_000, age)
    assert store.find(["a"]) == [store.directory / "a"]
    put(store, "d", 1_000)
    assert {path.name for path in store.directory.iterdir()} == {"a", "c", "d"}
    put(store, "e", 4_000)
    assert {path.name for path in store.directory.iterdir()} == {"a", "c", "d"}, "too large for the folder"


def test_only_a_whole_prefix_is_found(tmp_path: Path) -> None:
    store = LocalStages(directory=tmp_path / "stages")
    for key in ("a", "c"):
        put(store, key, 10)
    assert store.find(["a", "b", "c"]) == [store.directory / "a"]
    assert store.find(["b", "c"]) == []


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    store = LocalStages(directory=tmp_path / "stages")
    put(store, "a", 10)
    for name, age in ((".partial-old", 7_200), (".partial-new", 60)):
        (store.directory / name).mkdir()
        used = (store.directory / name).stat().st_mtime - age
        os.utime(store.directory / name, (used, used))
    with pytest.raises(ZeroDivisionError):
        store.put("b", lambda path: (path / "half").write_text("x") and 1 / 0)
    put(store, "c", 10)
    assert {path.name for path in store.directory.iterdir()} == {"a", "c", ".partial-new"}
