"""Operators are loaded once, and only where they pass their self-test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from needs import needs_compiler
from torch import Tensor

from heft_engine.cpu import build, operators
from heft_engine.runtime.devices import cpp_compiler
from heft_engine.runtime.threads import openmp_runtime


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    def forget() -> None:
        for function in (operators.amx_ops, operators.fused_ops, operators._namespace):
            function.cache_clear()

    forget()
    yield
    forget()


@needs_compiler
def test_fused_operators_are_there_with_a_compiler() -> None:
    assert operators.fused_ops() is not None


def test_amx_operators_are_there_where_the_processor_has_amx() -> None:
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    can_compile = cpp_compiler() is not None and openmp_runtime() is not None
    assert (operators.amx_ops() is not None) == (has_amx and can_compile)


def test_there_are_none_where_linux_denies_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load", lambda *_: SimpleNamespace(amx_enable=lambda: False))
    assert operators.amx_ops() is None


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEFT_KERNELS", "off")
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("loaded"))
    assert operators.fused_ops() is None
    assert operators.amx_ops() is None


def test_there_are_none_that_do_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*_: object) -> None:
        raise build.BuildError("there is no C++ compiler")

    monkeypatch.setattr(build, "load", load)
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops() is None
        assert operators.amx_ops() is None
    assert caplog.text.count("torch's own operations instead: there is no C++ compiler") == 1


@needs_compiler
def test_there_are_none_with_other_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return torch.nextafter(torch.ops.heft.rms_norm(x, weight, epsilon), torch.tensor(9.0).bfloat16())

    faulty = SimpleNamespace(rms_norm=rms_norm)
    operators.fused_ops()
    operators.fused_ops.cache_clear()
    monkeypatch.setattr(operators, "_namespace", lambda: faulty)
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops() is None
    assert "the norm gives other bits" in caplog.text
