"""Inference: scoring, decoding, key/value and prefix caches."""
