"""Stored files: artifacts, their rows, garbage collection."""
