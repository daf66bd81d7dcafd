"""Rows and tasks: reading rows, encoding them, metrics of answers."""
