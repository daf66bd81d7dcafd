"""Jobs: settings, claims, checkpoints, transitions of state."""
