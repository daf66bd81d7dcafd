"""Diagnostics of a trained model: how its stages changed weights, representations, curvature and general knowledge.

Each module states its formulas and their sources; `report` runs them all.
"""
