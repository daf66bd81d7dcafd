"""Compiling the operators: cached libraries, and reasons why they can't be compiled or cached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from needs import needs_compiler

from heft_engine.cpu import build

SOURCE = 'extern "C" int heft_test() { return 1; }'
Load = Callable[[], None]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def load(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a small source in place of the engine's, under a namespace that nobody has registered."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")

    def call() -> None:
        build.load(directory, "heft_test_build")

    return call


@needs_compiler
def test_a_library_is_compiled_once(load: Load, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    (library,) = directory.iterdir()
    assert library.suffix == ".so"
    assert directory.stat().st_mode & 0o077 == 0, "others must not be able to leave code there"
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled once more"))
    load()


@needs_compiler
@pytest.mark.parametrize("name", ["small.cpp", "new.h"])
def test_every_source_and_header_is_in_the_key(load: Load, directory: Path, name: str) -> None:
    load()
    (build.CSRC / name).write_text(SOURCE + "  // changed")
    load()
    assert len(list(directory.iterdir())) == 2


@needs_compiler
def test_flags_and_namespaces_are_in_the_key(load: Load, directory: Path) -> None:
    load()
    build.load(directory, "heft_test_build", ["-DFLAG"])
    build.load(directory, "heft_other_test_build")
    assert len(list(directory.iterdir())) == 3


@needs_compiler
def test_libraries_that_can_t_be_kept_are_compiled_each_time(
    load: Load, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's user may have no home."""
    directory.parent.write_text("no directory")
    with caplog.at_level(logging.INFO):
        load()
    assert "for this process alone" in caplog.text


@needs_compiler
def test_no_library_is_loaded_that_others_may_have_left(
    load: Load, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with caplog.at_level(logging.INFO):
        load()
    assert "other users can write" in caplog.text
    assert not list(directory.iterdir())


@needs_compiler
def test_a_compiler_s_message_is_the_error_s(load: Load, directory: Path) -> None:
    (build.CSRC / "small.cpp").write_text("this is no C++")
    with pytest.raises(build.BuildError, match=r"small\.cpp:1:1: error"):
        load()
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("missing", "message"), [("openmp_runtime", "OpenMP"), ("cpp_compiler", "no C\\+\\+ compiler")]
)
def test_what_is_missing_is_named(
    load: Load, missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, missing, lambda: None)
    with pytest.raises(build.BuildError, match=message):
        load()


@needs_compiler
def test_a_namespace_is_registered_once() -> None:
    """A second library with the same operators would end the process."""
    build_directory = Path("/nonexistent")
    if hasattr(torch.ops.heft, "rms_norm"):
        assert build.load(build_directory) is torch.ops.heft
