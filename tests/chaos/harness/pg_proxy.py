"""Stands between the service and its Postgres, and can cut a connection around a COMMIT: before it reaches the server
(nothing happened) or when the server has answered it (it happened, and nobody was told). The caller sees the same.

`pg_proxy.py <folder to listen in> <folder of the server's socket> <armed file>`; the armed file holds `before` or
`after` and serves once. It does NOT understand the protocol beyond that one word.
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
        ways = [
            asyncio.create_task(self._to_server(client, to_server, cut)),
            asyncio.create_task(self._to_client(server, to_client, cut)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
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
                    return  # the answer to the COMMIT: it never arrives
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
