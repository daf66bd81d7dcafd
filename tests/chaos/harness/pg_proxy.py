"""A proxy in front of Postgres that can close a connection at a COMMIT.

It closes it before the COMMIT reaches the server (nothing is committed) or before the server's answer reaches the
client (it is committed). The client sees the same in both cases.

`pg_proxy.py <folder to listen in> <folder of the server's socket> <armed file>`; the armed file contains
`before` or `after` and is removed when it is used.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

SOCKET = ".s.PGSQL.5432"
_COMMIT = b"COMMIT\0"


class Proxy:
    def __init__(self, listen: Path, server: Path, armed: Path) -> None:
        self._listen, self._server, self._armed = listen / SOCKET, server / SOCKET, armed

    async def run(self) -> None:
        self._listen.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, self._listen)
        async with server:
            await server.serve_forever()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            server, to_server = await asyncio.open_unix_connection(self._server)
        except OSError:
            to_client.close()
            return
        cut = asyncio.Event()
        directions = [
            asyncio.create_task(self._to_server(client, to_server, cut)),
            asyncio.create_task(self._to_client(server, to_client, cut)),
        ]
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        for writer in (to_client, to_server):
            writer.close()

    async def _to_server(
        self, client: asyncio.StreamReader, server: asyncio.StreamWriter, cut: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while chunk := await client.read(65_536):
                when = self._take_order() if _COMMIT in chunk else None
                if when == "before":
                    return
                if when == "after":
                    cut.set()
                server.write(chunk)
                await server.drain()

    async def _to_client(
        self, server: asyncio.StreamReader, client: asyncio.StreamWriter, cut: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while chunk := await server.read(65_536):
                if cut.is_set():
                    return  # the answer to the COMMIT is dropped
                client.write(chunk)
                await client.drain()

    def _take_order(self) -> str | None:
        try:
            order = self._armed.read_text()
            self._armed.unlink()
        except FileNotFoundError:
            return None
        return order


if __name__ == "__main__":
    asyncio.run(Proxy(*(Path(argument) for argument in sys.argv[1:4])).run())
