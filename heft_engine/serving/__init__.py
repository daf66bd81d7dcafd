"""Serving: dynamic batching of many requests to many models, in the library and in the inference worker."""
