"""The compiled operators of this machine, each tested before it is used (heft_engine.cpu.selftest).

Both functions return None where nothing can be compiled, HEFT_KERNELS is off or a self-test fails; torch's own
operations run then.
"""

from __future__ import annotations

import logging
import subprocess
from functools import lru_cache
from typing import Any

from platformdirs import user_cache_path

from heft_engine.cpu import build
from heft_engine.cpu.amx import AmxOps
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.cpu.selftest import failed_amx_check, failed_fused_check
from heft_engine.runtime.devices import kernels_enabled

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def fused_ops() -> FusedOps | None:
    """Norms, rotary embeddings and logits."""
    namespace = _namespace()
    if namespace is None:
        return None
    operators = FusedOps(namespace)
    failed = failed_fused_check(operators)
    if failed:
        log.info("no compiled kernels, torch's own operations instead: %s gives other bits here", failed)
        return None
    return operators


@lru_cache(maxsize=1)
def amx_ops() -> AmxOps | None:
    """Linear layers and attention on AMX; None also where the processor has none."""
    namespace = _namespace()
    if namespace is None or not hasattr(namespace, "amx_enable") or not namespace.amx_enable():
        return None
    operators = AmxOps(namespace)
    failed = failed_amx_check(operators)
    if failed:
        log.info("no AMX products, torch's own instead: %s gives other bits here", failed)
        return None
    return operators


@lru_cache(maxsize=1)
def _namespace() -> Any:
    """torch.ops.heft, compiled if need be; None where that can't be, which is logged once."""
    if not kernels_enabled():
        return None
    try:
        return build.load(user_cache_path("heft") / "kernels")
    except (OSError, subprocess.SubprocessError, build.BuildError) as error:
        log.info("no compiled kernels, torch's own operations instead: %s", error)
        return None
