"""What a `heft` command can fail with: a sentence for the person at the terminal, no stack trace."""

from __future__ import annotations


class CommandError(Exception):
    """The command ends with this message and exit code 1."""


class AlreadyRunning(CommandError):
    """Another process holds the lock that this one needs."""
