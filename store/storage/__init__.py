"""Bytes: artifacts, files, and the removal of what nothing refers to."""
