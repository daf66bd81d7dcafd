"""Evaluation of a model on rows, and calibration of its probabilities."""
