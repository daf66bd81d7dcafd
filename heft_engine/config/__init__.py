"""Configuration of runs, stages and known datasets. Imports no torch: the service's store reads it too."""
