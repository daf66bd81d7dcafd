"""JSON schemas of answers, checked and written down as xgrammar holds them exactly. Imports nothing else."""
