"""Marks of tests that need something of the machine: an OpenMP runtime, or a C++ compiler."""

from __future__ import annotations

import pytest

from heft_engine.runtime.devices import cpp_compiler
from heft_engine.runtime.threads import openmp_runtime

needs_runtime = pytest.mark.skipif(
    openmp_runtime() is None, reason="torch has no OpenMP runtime here, or several: rows run on one thread"
)
needs_compiler = pytest.mark.skipif(
    cpp_compiler() is None or openmp_runtime() is None,
    reason="kernels need a C++ compiler and one OpenMP runtime; without them torch's own operations run",
)
