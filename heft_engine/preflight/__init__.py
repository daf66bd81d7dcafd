"""Checks of a job before it is trained: model, settings, rows, duplicates and leakage."""
