"""Base models as the engine runs them: packed batches, attention, interventions, losses."""
