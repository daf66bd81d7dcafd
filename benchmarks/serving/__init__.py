"""Throughput and latency of HEFT as a library and over HTTP, compared with pyreft's `generate` and transformers.

python -m benchmarks.serving --data boolq/train.jsonl                  everything but the overload: some minutes
python -m benchmarks.serving --data boolq/train.jsonl --parts models   one part

SERVING.md is written from the results of all parts so far.
"""
