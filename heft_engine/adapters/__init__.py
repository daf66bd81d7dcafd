"""Adapters: what a stage trains. LoRA with its variants, and six kinds of ReFT; merging, and its parity check."""
