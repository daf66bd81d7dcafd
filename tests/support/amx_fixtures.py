"""AMX operators for tests: the processor's own, or the same C++ with emulated tile instructions (amx_emulation.h).

heft_engine is imported inside the functions, so that tests of the API can be collected without torch.
"""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from heft_engine.cpu.amx import AmxOps

_EMULATION = Path(__file__).parent / "amx_emulation.h"


@cache
def _amx_ops() -> AmxOps | str:
    """Returns the operators, or the reason why there are none."""
    from platformdirs import user_cache_path

    try:
        from heft_engine.cpu import build, operators
        from heft_engine.cpu.amx import AmxOps
    except ModuleNotFoundError:
        return "heft_engine.cpu is not there"

    amx_ops = operators.amx_ops()
    if amx_ops is not None:
        return amx_ops
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        return "this processor has neither AMX nor AVX512-BF16, on which AMX is emulated"
    version = hashlib.sha256(_EMULATION.read_bytes()).hexdigest()
    flags = ["-O1", f'-DHEFT_EMULATE_AMX="{_EMULATION}"', f"-DHEFT_EMULATION_VERSION={version}"]
    try:
        namespace = build.load(user_cache_path("heft") / "test-kernels", "heft_emulated_amx", flags)
    except (OSError, subprocess.SubprocessError, build.BuildError) as error:
        return str(error)
    return AmxOps(namespace)


@pytest.fixture
def amx_ops() -> AmxOps:
    """The AMX operators; skips tests where a processor can't even emulate AMX or nothing can be compiled."""
    operators = _amx_ops()
    if isinstance(operators, str):
        pytest.skip(operators)
    return operators


@pytest.fixture
def with_amx(amx_ops: AmxOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine multiplies and attends on AMX, emulated where the processor has none."""
    from heft_engine.cpu import operators

    monkeypatch.setattr(operators, "amx_ops", lambda: amx_ops)


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention are torch's, as where a processor has no AMX or nothing can be compiled."""
    try:
        from heft_engine.cpu import operators
    except ModuleNotFoundError:  # the package can be deleted
        return
    monkeypatch.setattr(operators, "amx_ops", lambda: None)
