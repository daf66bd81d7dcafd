"""The optimizer's step: AdamW, a loss scale for float16, and what happens when memory runs out in it."""
