"""Configuration of runs and known datasets. Store, API and CLI import it, so it imports no torch."""
