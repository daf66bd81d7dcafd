"""Checks of data before a run: rows, duplicates, leakage, lengths."""
