"""Answers at speed: ours in the library and over HTTP, against pyreft's `generate` and plain transformers.

python -m benchmarks.serving --data boolq/train.jsonl                  everything but the overload: some minutes
python -m benchmarks.serving --data boolq/train.jsonl --parts models   one part; SERVING.md is made from all so far
"""
