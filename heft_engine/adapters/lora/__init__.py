"""LoRA (arXiv 2106.09685) and its variants: trained through peft, merged into the base when the stage ends."""
