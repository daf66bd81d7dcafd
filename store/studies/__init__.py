"""Studies: arms, points, search, verdicts."""
