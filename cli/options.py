"""What every command is told: which home, which service, which key. It does NOT connect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from cli.errors import CommandError
from cli.stack.home import Home

if TYPE_CHECKING:
    from cli.client import Client


@dataclass(frozen=True, kw_only=True)
class Target:
    """The options before the command's name. Without an address: the stack that runs in the home."""

    home: Home
    url: str | None = None
    api_key: str | None = None
    database_url: str | None = None  #: for commands that need no running service

    def client(self) -> Client:
        """Raises CommandError that says what to set when address or key can't be told."""
        from cli.client import Client
        from cli.stack.up import running_stack

        url = self.url
        if url is None:
            stack = running_stack(self.home)
            if stack is None:
                raise CommandError(f"no stack runs in {self.home.path}: start `heft up`, or set HEFT_URL")
            url = stack.url
        return Client(url, self.api_key or self._key_of_home())

    def _key_of_home(self) -> str:
        try:
            return self.home.key_file.read_text().strip()
        except OSError:
            raise CommandError(f"no key in {self.home.key_file}: set HEFT_API_KEY") from None


def target(context: typer.Context) -> Target:
    found = context.find_root().obj
    assert isinstance(found, Target)
    return found
