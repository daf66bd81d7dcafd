"""A study as JSON, as Markdown, and as one page with plots that needs nothing beside it.

Made by the command, from what the service answers: neither the API nor a worker draws anything. It does NOT judge:
every number and sentence is the study's own.
"""

from __future__ import annotations
