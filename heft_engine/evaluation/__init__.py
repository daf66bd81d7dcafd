"""Evaluation: metrics with confidence intervals, calibration, and packed values of rows."""
