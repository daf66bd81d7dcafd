"""Answers: scores and text, for the API's messages."""
