"""torch.compile for decoder layers while they train: norms, rotary embeddings, activations and residuals in one pass
over memory each, where they otherwise take a dozen.

On a CPU it needs a C++ compiler and half a minute, once for a model on a machine; so it is for stages long enough to
gain more than that. Attention stays as it is, and so does everything that runs without a gradient: what is scored has
the same bits whether a stage was compiled or not. It does NOT know stages or data.
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
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.devices import cpp_compiler

#: Arithmetic of a stage (floating-point operations) from which compiling its layers pays: a minute and a half of two
#: cores' time, of which it saves a quarter to a third.
WORTH = 3e13


def pays(lm: PackedLM, tokens: int) -> bool:
    """Whether a stage that runs so many tokens forward and backward is long enough, on a device where it was tried."""
    # Forward and backward through a frozen base: 4 operations a parameter and token.
    return lm.device.type == "cpu" and can_compile() and 4 * lm.parameters * tokens >= WORTH


def can_compile() -> bool:
    """Whether there is a C++ compiler."""
    return cpp_compiler() is not None


@contextmanager
def compiled_layers(
    lm: PackedLM, first: int, try_out: Callable[[], None], cache_dir: Path | None
) -> Iterator[Exception | None]:
    """Layers after `first` run compiled inside, wherever gradients are computed. (`first` has an input without a
    gradient: compiling it too would take the same time again.)

    `try_out` runs a forward and backward pass. Yields what it raised, if anything; the layers then run as they are.
    """
    # In its own place: in the default one, in /tmp under the user's name, anybody may leave code to be loaded.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((cache_dir or user_cache_path("heft")) / "compiled"))
    plain = {layer: layer.forward for layer in list(lm.layers)[first + 1 :]}
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
    # Compiling in processes of its own would leave them behind when this one is killed.
    with torch._inductor.config.patch(compile_threads=1):
        try:
            for layer, forward in plain.items():
                layer.forward = _where_gradients_are(forward, torch.compile(forward, dynamic=True))
            yield _failure(try_out, plain)
        finally:
            AttentionInterface.register(IMPLEMENTATION, packed_attention)
            for layer in plain:
                layer.__dict__.pop("forward", None)


def _failure(try_out: Callable[[], None], layers: Any) -> Exception | None:
    try:
        try_out()
    except Exception as error:  # noqa: BLE001  whatever a compiler may raise: training goes on without it
        for layer in layers:
            layer.__dict__.pop("forward", None)
        return error
    return None


def _where_gradients_are(plain: Any, compiled: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
