"""Fixtures that every test may use; what they do stands in tests/support."""

pytest_plugins = ["tiny_models"]
