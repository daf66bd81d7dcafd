"""Rows, tasks and metrics: reading, validating and encoding rows."""
