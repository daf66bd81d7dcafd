"""Errors of `heft` commands, which are printed without a stack trace."""

from __future__ import annotations


class CommandError(Exception):
    """The command ends with this message and exit code 1."""


class AlreadyRunning(CommandError):
    """Another process holds a lock that this one needs."""
