"""LoRA (arXiv 2106.09685) and its variants: trained through peft, merged into the base when the stage ends."""

import sys

if "bitsandbytes" not in sys.modules:
    # peft would import it, which takes two seconds, for adapter classes of layers that never occur here
    # (heft_engine.model.nf4).
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        from peft import import_utils
    finally:
        del sys.modules["bitsandbytes"]
    # It remembers its answers: code that uses peft beside this engine must get the right ones.
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()
