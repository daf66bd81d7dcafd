"""Studies: settings, arms, searches, verdicts."""
