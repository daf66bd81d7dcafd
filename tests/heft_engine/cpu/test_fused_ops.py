"""Compiled kernels: torch's bits, or none at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ctypes_signatures import assert_types_are_declared
from needs import needs_compiler

from heft_engine.cpu import build, operators
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.runtime import devices
from heft_engine.runtime.threads import torch_threads


def forget() -> None:
    operators.fused_ops.cache_clear()
    build.library.cache_clear()


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    forget()
    yield
    forget()


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_give_the_bits_of_torchs_operations(tmp_path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    compiled = operators.fused_ops(tmp_path)
    assert compiled is not None
    # More elements than one thread takes, and an odd number of rows.
    x, y, weight = some(1, 301, 576), some(1, 301, 576), some(576)
    single = x.float()
    normed = (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(compiled.rms_norm(x, weight, 1e-6), weight * normed)
    total = y.clone()
    again = compiled.add_rms_norm(x, total, weight, 1e-6)
    assert torch.equal(total, x + y)
    assert torch.equal(again, compiled.rms_norm(x + y, weight, 1e-6))
    gate, up = some(301, 1_536), some(301, 1_536)
    with torch_threads(1):  # several threads leave torch rests, which it rounds otherwise
        expected = F.silu(gate) * up
    assert torch.equal(compiled.gate_silu(gate.clone(), up), expected)


@needs_compiler
@torch.inference_mode()
def test_logits_are_summed_in_one_order() -> None:
    """Whatever the number of rows and threads; torch's differ with both."""
    compiled = operators.fused_ops()
    assert compiled is not None
    for width in (8, 96, 590):
        x, weight = some(11, width), some(600, width)
        exact = (x.double() @ weight.double().T).float()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = compiled.logits(x, weight)
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
            for rows in (1, 2, 4, 5):
                assert torch.equal(compiled.logits(x[3 : 3 + rows], weight), found[3 : 3 + rows])
            torch.set_num_threads(1)
            assert torch.equal(compiled.logits(x, weight), found)


@needs_compiler
def test_tensors_that_do_not_fit_are_refused() -> None:
    """A kernel sees addresses alone."""
    compiled = operators.fused_ops()
    assert compiled is not None
    x, weight, places, none = some(6, 2, 8), some(8), torch.arange(6), torch.arange(0)
    turned = some(6, 8)
    wrong: list[Callable[[], object]] = [
        lambda: compiled.rms_norm(x, some(9), 1e-5),
        lambda: compiled.rms_norm(x.float(), weight, 1e-5),
        lambda: compiled.add_rms_norm(some(5, 2, 8), x, weight, 1e-5),
        lambda: compiled.add_rms_norm(x, x.transpose(0, 1), weight, 1e-5),
        lambda: compiled.rotate(x, turned[:5], turned, places, none),
        lambda: compiled.rotate(x, turned.float(), turned.float(), places, none),
        lambda: compiled.rotate(x, turned, turned, places[:4], none),
        lambda: compiled.place(x, places[:4], none),
        lambda: compiled.place(x.transpose(0, 1), places[:2], none),
        lambda: compiled.gate_silu(x, some(6, 2, 7)),
        lambda: compiled.gate_silu(x.transpose(0, 1), x.transpose(0, 1)),
        lambda: compiled.logits(some(6, 8), some(9, 7)),
        lambda: compiled.logits(some(6, 8), some(9, 8).float()),
        lambda: compiled.logits(some(6, 8), some(8, 9).T),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="fit together"):
            call()


@needs_compiler
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.fused_ops(tmp_path) is not None
    (library,) = (tmp_path / "kernels").iterdir()
    assert library.suffix == ".so"
    assert library.parent.stat().st_mode & 0o077 == 0, "others must not be able to leave code there"
    forget()
    monkeypatch.setattr(build, "_compile", lambda *where: pytest.fail("compiled once more"))
    assert operators.fused_ops(tmp_path) is not None


@needs_compiler
def test_where_nothing_can_be_kept_they_are_compiled_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container's user may have no home."""
    (tmp_path / "kernels").write_text("no directory")
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is not None
    assert "for this process alone" in caplog.text


@needs_compiler
def test_nothing_is_loaded_that_others_may_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is not None
    assert "others may leave code" in caplog.text
    assert not list((tmp_path / "kernels").iterdir())


def test_there_are_none_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is None
    assert "torch's own operations" in caplog.text


@needs_compiler
def test_there_are_none_that_do_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "kernels.cpp"
    source.write_text("this is no C++")
    monkeypatch.setattr(build, "SOURCES", (source,))
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is None
    assert "failed: " in caplog.text
    assert not list((tmp_path / "kernels").iterdir())


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("through_bf16(load(x + i) * rates)", "(load(x + i) * rates)", "the norm"),
        ("load(x + i) + load(y + i)", "load(x + i) - load(y + i)", "the sum and its norm"),
        ("through_bf16(-b * load(sin_low + i))", "-b * load(sin_low + i)", "the rotary embedding"),
        ("through_bf16(silu(load(gate + i)))", "silu(load(gate + i))", "the gated activation"),
        ("std::memcpy(&values, from[k] + i,", "std::memcpy(&values, from[0] + i,", "the head"),
        ("std::memcpy(out + places[row] * width", "std::memcpy(out + row * width", "placing"),
    ],
)
def test_there_are_none_with_other_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    right: str,
    wrong: str,
    named: str,
) -> None:
    """One rounding too few is enough."""
    kept = [build.SOURCES[0], build.SOURCES[0].with_name("norms.h")]
    texts = [each.read_text() for each in kept]
    assert sum(right in text for text in texts) == 1
    # What a file includes is looked for beside it first.
    for each, text in zip(kept, texts, strict=True):
        (tmp_path / each.name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "SOURCES", (tmp_path / kept[0].name,))
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is None
    assert f"{named} gives other bits" in caplog.text


def test_an_operator_turns_them_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEFT_KERNELS", "off")
    assert operators.fused_ops(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_two_openmp_runtimes_are_one_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "openmp_runtime", lambda: None)
    with caplog.at_level(logging.INFO):
        assert operators.fused_ops(tmp_path) is None
    assert "OpenMP" in caplog.text


def test_types_are_those_of_the_source() -> None:
    assert_types_are_declared(build.SOURCES[0].read_text(), FusedOps, "heft_")
