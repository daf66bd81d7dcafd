"""A service on loopback with scripted answers, for tests of the command."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from running_stack import heft
from typer.testing import Result


@dataclass
class Service:
    """Answers each request with the next of what `answers` holds for it; the last one stays."""

    url: str = ""
    answers: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)
    bodies: list[tuple[str, Any]] = field(default_factory=list)

    def run(self, *arguments: str) -> Result:
        return heft("--url", self.url, "--api-key", "k", *arguments)

    def on(self, request: str, *answers: tuple[int, Any]) -> None:
        self.answers[request] = list(answers)


@contextmanager
def scripted_service() -> Iterator[Service]:
    scripted = Service()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.path}"
            is_json = self.headers.get("Content-Type") == "application/json"
            scripted.bodies.append((request, json.loads(body) if is_json else body))
            script = scripted.answers.get(request, [(500, f"nothing is scripted for {request}".encode())])
            status, value = script.pop(0) if len(script) > 1 else script[0]
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield scripted
    server.shutdown()
    thread.join()
    server.server_close()
