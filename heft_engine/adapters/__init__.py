"""Adapters: how a stage changes the model. LoRA and its variants, six kinds of ReFT; merging, and its check."""
