"""The compiled operators of this machine, each tested against torch's own before it is used.

Both functions return None where nothing can be compiled or a self-test fails; torch's own operations run then.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from heft_engine.cpu import build
from heft_engine.cpu.amx import AmxOps
from heft_engine.cpu.fused_ops import FusedOps
from heft_engine.cpu.selftest import failed_amx_check, failed_fused_check

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def fused_ops(cache_dir: Path | None = None) -> FusedOps | None:
    """Norms, rotary embeddings, gated activations and logits. `cache_dir` None means the user's own cache."""
    library = build.library(cache_dir)
    if library is None:
        return None
    operators = FusedOps(library)
    failed = failed_fused_check(operators)
    if failed:
        log.info("no compiled kernels, torch's own operations instead: %s gives other bits here", failed)
        return None
    return operators


@lru_cache(maxsize=1)
def amx_ops(cache_dir: Path | None = None) -> AmxOps | None:
    """Products and attention on AMX; None also where the processor has none. `cache_dir` as above."""
    library = build.library(cache_dir)
    if library is None or not getattr(library, "heft_units_ready", lambda: 0)():
        return None
    operators = AmxOps(library)
    failed = failed_amx_check(operators)
    if failed:
        log.info("no AMX products, torch's own instead: %s gives other bits here", failed)
        return None
    return operators
