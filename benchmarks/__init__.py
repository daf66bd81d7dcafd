"""Comparisons with other tools, run by hand: `python -m benchmarks --data rows.jsonl` (or `make bench`)."""
