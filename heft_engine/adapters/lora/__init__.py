"""LoRA (arXiv 2106.09685) and its variants: trained through peft, merged into the base when the stage ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Inside, peft does not import bitsandbytes, which takes two seconds.

    It would do so for adapter classes of bitsandbytes' own layers, which never occur here (heft_engine.model.nf4).
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]


with without_bitsandbytes():
    import peft as peft
