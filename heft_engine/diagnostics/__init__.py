"""Why a model is as it is: what its stages did to weights, representations, curvature and to what it knew before.

Each module states its formulas and where they come from; `heft_engine.diagnostics.report` brings them together.
"""
