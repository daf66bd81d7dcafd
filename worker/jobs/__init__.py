"""One job's way through a worker: claim, rows, training, publication."""
