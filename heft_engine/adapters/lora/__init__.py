"""LoRA (arXiv 2106.09685) and its variants: trained through peft, merged into the base when the stage ends."""

import sys

# peft would import bitsandbytes for adapter classes of its own layers, which never occur here (heft_engine.model.nf4):
# two seconds at each start.
if "bitsandbytes" not in sys.modules:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import peft as peft

    del sys.modules["bitsandbytes"]
