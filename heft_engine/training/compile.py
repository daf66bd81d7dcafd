"""torch.compile for decoder layers in training: fewer passes over memory for norms, activations and residuals.

On a CPU it needs a C++ compiler and half a minute, once for a model on a machine; so it is for stages long enough to
gain more than that. Attention is not compiled, nor is anything that runs without a gradient: scores have the same bits
whether a stage was compiled or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from transformers import AttentionInterface

from heft_engine.model.attention import IMPLEMENTATION, packed_attention
from heft_engine.model.nf4 import is_quantized
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import cpp_compiler

#: Floating-point operations of a stage from which compiling its layers pays. They take two cores a minute and a half,
#: of which compiled layers save a quarter to a third.
WORTH = 3e13


def pays(lm: PackedLM, tokens: int) -> bool:
    """Returns whether compiling pays for so many tokens, forward and backward. Measured on CPUs only."""
    # Forward and backward through a frozen base: 4 operations a parameter and token.
    runs_compiled = lm.device.type == "cpu" and not is_quantized(lm.model)
    return runs_compiled and can_compile() and 4 * lm.parameters * tokens >= WORTH


def can_compile() -> bool:
    """Returns whether there is a C++ compiler."""
    return cpp_compiler() is not None


@contextmanager
def compiled_layers(
    lm: PackedLM, first: int, try_out: Callable[[], None], cache_dir: Path | None
) -> Iterator[Exception | None]:
    """Inside, layers after `first` run compiled wherever gradients are computed.

    `first` has an input without a gradient: compiling it too would take the same time again. `try_out` runs a forward
    and backward pass. Yields the exception it raised, if any; the layers then run uncompiled.
    """
    # Not in the default directory, in /tmp under the user's name, where anybody may leave code to be loaded.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((cache_dir or user_cache_path("heft")) / "compiled"))
    eager = {layer: layer.forward for layer in list(lm.layers)[first + 1 :]}
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
    # Compile workers would outlive this process when it is killed.
    with torch._inductor.config.patch(compile_threads=1):
        try:
            for layer, forward in eager.items():
                layer.forward = _compiled_with_gradients(forward, torch.compile(forward, dynamic=True))
            yield _failure(try_out, eager)
        finally:
            AttentionInterface.register(IMPLEMENTATION, packed_attention)
            for layer in eager:
                layer.__dict__.pop("forward", None)
            # Dynamo counts compilations by code object: a process's ninth model would run uncompiled.
            torch.compiler.reset()


def _failure(try_out: Callable[[], None], layers: Any) -> Exception | None:
    try:
        try_out()
    except Exception as error:  # noqa: BLE001  a compiler may raise anything; training goes on without it
        for layer in layers:
            layer.__dict__.pop("forward", None)
        return error
    return None


def _compiled_with_gradients(eager: Any, compiled: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return forward
