"""Answering many requests at once: what serves a model to those who wait, in the library as in a worker.

Rows are packed into shared passes, keys and values are kept under byte budgets, and no answer depends on what it is
computed beside. Nothing here knows queues, HTTP or owners.
"""
