"""A Hugging Face hub of a few repositories on loopback: the endpoints that huggingface_hub and datasets call.

Small and hand-written: repositories are dicts of bytes, revisions are one commit and the branch `main`. Answers
and error headers are those of the real hub. Every request is kept in `FakeHub.requests`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True, kw_only=True)
class Repository:
    files: Mapping[str, bytes]
    gated: bool = False

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass(kw_only=True)
class FakeHub:
    """`repositories` by kind ("models", "datasets") and name; change it as you like while it runs."""

    url: str
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    down: bool = False
    requests: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An answer with a status and the header by which the client knows the reason."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub; set HF_ENDPOINT to its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = FakeHub(url=f"http://127.0.0.1:{server.server_port}")
    Handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, name="fake-hub")
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: the requests are recorded instead."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            if self.hub.down:
                raise Refusal(503, "Maintenance")
            content, headers = self._route(unquote(url.path), body)
        except Refusal as refusal:
            self._send(refusal.status, b"{}", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})
        else:
            self._send(200, content, headers)

    def _route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            kind, name, revision = match.groups()
            return _json(_info(name, self._repository(kind, name, revision or "main")))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check", path):
            self._open(self._repository(*match.groups(), "main"))
            return _json({})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            kind, name, revision, folder = match.groups()
            return _json(_tree(self._repository(kind, name, revision), folder))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            kind, name, revision = match.groups()
            paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return _json([e for e in _entries(self._repository(kind, name, revision)) if e["path"] in paths])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            return self._file(self._repository("datasets" if kind else "models", name, revision), file)
        raise Refusal(404, "EntryNotFound")

    def _repository(self, kind: str, name: str, revision: str) -> Repository:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            raise Refusal(404, "RepoNotFound")
        if revision not in ("main", repository.commit):
            raise Refusal(404, "RevisionNotFound")
        return repository

    def _open(self, repository: Repository) -> None:
        if repository.gated:
            raise Refusal(403, "GatedRepo")

    def _file(self, repository: Repository, name: str) -> tuple[bytes, dict[str, str]]:
        self._open(repository)
        if name not in repository.files:
            raise Refusal(404, "EntryNotFound")
        content = repository.files[name]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            content = content[int(byte_range[1]) : int(byte_range[2]) + 1 if byte_range[2] else None]
        return content, headers

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(206 if status == 200 and self.headers.get("Range") else status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in repository.files]
    return {"id": name, "sha": repository.commit, "gated": repository.gated, "private": False,
            "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip


def _entries(repository: Repository) -> list[dict[str, Any]]:
    folders = {file.rsplit("/", 1)[0] for file in repository.files if "/" in file}
    files = [
        {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
        for path, content in repository.files.items()
    ]
    return [
        *({"type": "directory", "path": path, "size": 0, "oid": _oid(path.encode())} for path in folders),
        *files,
    ]


def _tree(repository: Repository, folder: str | None) -> list[dict[str, Any]]:
    entries = _entries(repository)
    if folder and not any(entry["path"].startswith(folder + "/") for entry in entries):
        raise Refusal(404, "EntryNotFound")
    return [entry for entry in entries if not folder or entry["path"].startswith(folder + "/")]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _json(value: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}
