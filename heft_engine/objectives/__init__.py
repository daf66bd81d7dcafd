"""Objectives: what a stage is trained for, whatever adapter it trains."""
