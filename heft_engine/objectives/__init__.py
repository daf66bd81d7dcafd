"""Objectives: what a stage is trained for."""
