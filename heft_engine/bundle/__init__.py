"""Bundles: the directory that a job leaves behind, and its exports."""
