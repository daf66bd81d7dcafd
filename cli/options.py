"""The options that all commands share: home, service, key, database."""

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
    """The options before the command's name. `url` None: the stack that runs in the home."""

    home: Home
    url: str | None = None
    api_key: str | None = None
    database_url: str | None = None  #: for commands without a running service

    def client(self) -> Client:
        """Returns a client of the service. Raises CommandError if no URL or key is known."""
        from cli.client import Client
        from cli.stack.up import running_stack

        url = self.url
        if url is None:
            stack = running_stack(self.home)
            if stack is None:
                raise CommandError(f"no service runs in {self.home.path}: start `heft up`, or set HEFT_URL")
            url = stack.url
        return Client(url, self.api_key or self._key_of_home())

    def _key_of_home(self) -> str:
        try:
            return self.home.key_file.read_text().strip()
        except OSError:
            raise CommandError(f"there is no API key in {self.home.key_file}: set HEFT_API_KEY") from None


def target(context: typer.Context) -> Target:
    options = context.find_root().obj
    assert isinstance(options, Target)
    return options
