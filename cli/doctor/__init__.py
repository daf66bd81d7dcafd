"""Checks of a machine and its settings, for heft doctor."""
