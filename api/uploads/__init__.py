"""Uploads: multipart bodies, read as they arrive."""
