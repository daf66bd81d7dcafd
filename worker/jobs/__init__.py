"""One attempt at a job: claim, rows, engine process, events, checkpoints, the finished model."""
