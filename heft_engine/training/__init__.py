"""Training: runs, stages, plans, caches of frozen activations, checkpoints."""
