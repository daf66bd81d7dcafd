"""The error of a schema that a grammar can't hold."""

from __future__ import annotations

#: Steps from a schema to one of its parts: names of fields and indices of lists.
Path = tuple[str | int, ...]


class SchemaError(ValueError):
    """A schema that a grammar can't hold. `path` leads to the part at fault; `reason` says what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason
