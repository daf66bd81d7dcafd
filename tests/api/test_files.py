"""Files over HTTP: streamed in and out, authenticated before the body is read, no file left after an error."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

NewFiles = Callable[[], set[Path]]
ROW = b'{"prompt": "2 + 2 =", "completion": " 4"}\n'


def upload(client: httpx.Client, content: bytes = ROW, **changes: object) -> httpx.Response:
    request: dict[str, object] = {
        "files": {"file": ("rows.jsonl", content)},
        "data": {"purpose": "fine-tune"},
    }
    return client.post("/v1/files", **(request | changes))  # type: ignore[arg-type]


def test_a_file_is_downloaded_as_it_was_uploaded(client: httpx.Client) -> None:
    content = ROW * 5_000

    created = upload(client, content).json()

    assert created["id"].startswith("file-")
    assert created | {"id": "", "created_at": 0} == {
        "id": "",
        "object": "file",
        "bytes": len(content),
        "created_at": 0,
        "expires_at": None,
        "filename": "rows.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
    }
    assert client.get(f"/v1/files/{created['id']}").json() == created
    answer = client.get(f"/v1/files/{created['id']}/content")
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize("name", ["zeilen ü 行.jsonl", 'a "b".jsonl', "a;b.jsonl", "../../etc/passwd"])
def test_a_file_keeps_its_name(client: httpx.Client, name: str) -> None:
    created = upload(client, files={"file": (name, ROW)}).json()
    assert created["filename"] in (name, name.replace('"', "%22"))  # as httpx escapes a quote


@pytest.mark.parametrize("parameter", [b"filename*=utf-8''na%C3%AFve.jsonl", b'filename="na\xefve.jsonl"'])
def test_file_names_as_older_clients_send_them_are_read(client: httpx.Client, parameter: bytes) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    form += (
        b'--b\r\nContent-Disposition: form-data; name="file"; '
        + parameter
        + b"\r\n\r\n"
        + ROW
        + b"\r\n--b--\r\n"
    )
    answer = client.post(
        "/v1/files", content=form, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert answer.json()["filename"] == "naïve.jsonl"


def test_a_deleted_file_is_hidden_at_once_and_its_content_is_kept_until_the_sweep(
    client: httpx.Client, new_files: NewFiles
) -> None:
    file_id = upload(client).json()["id"]

    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}

    assert client.get(f"/v1/files/{file_id}").status_code == 404
    assert client.get(f"/v1/files/{file_id}/content").status_code == 404
    assert client.delete(f"/v1/files/{file_id}").status_code == 404
    assert client.get("/v1/files").json()["data"] == []
    assert len(new_files()) == 1


def test_lists_are_paged_in_both_orders(client: httpx.Client) -> None:
    ids = [upload(client).json()["id"] for _ in range(5)]

    first = client.get("/v1/files", params={"limit": 2}).json()
    second = client.get("/v1/files", params={"limit": 10_000, "after": first["last_id"]}).json()

    assert [file["id"] for file in first["data"] + second["data"]] == ids[::-1]
    assert (first["object"], first["has_more"], second["has_more"]) == ("list", True, False)
    assert [file["id"] for file in client.get("/v1/files?order=asc").json()["data"]] == ids
    assert client.get("/v1/files?purpose=fine-tune-results").json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("after=file-none", "after")],
)
def test_an_invalid_list_query_is_refused(client: httpx.Client, query: str, param: str) -> None:
    answer = client.get(f"/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_another_owner_sees_nothing(client: httpx.Client, stranger: httpx.Client) -> None:
    file_id = upload(client).json()["id"]

    assert stranger.get("/v1/files").json()["data"] == []
    for answer in (
        stranger.get(f"/v1/files/{file_id}"),
        stranger.get(f"/v1/files/{file_id}/content"),
        stranger.delete(f"/v1/files/{file_id}"),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert client.get(f"/v1/files/{file_id}").status_code == 200


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"data": {}}, 400, "purpose"),
        ({"data": {"purpose": "vision"}}, 400, "purpose"),
        ({"data": {"purpose": "fine-tune", "expires_after[seconds]": "3600"}}, 400, "expires_after[seconds]"),
        ({"data": {"purpose": "fine-tune", "note": "x" * 5_000}}, 413, "note"),
        ({"data": {"purpose": "fine-\0tune"}}, 400, "purpose"),
        ({"files": {"file": ("rows.jsonl", b"")}}, 400, "file"),
        ({"files": {"rows": ("rows.jsonl", ROW)}}, 400, "file"),
        ({"files": [("file", ("a.jsonl", ROW)), ("file", ("b.jsonl", ROW))]}, 400, "file"),
        ({"files": {"file": ("rows.jsonl", ROW * 50_000)}}, 413, "file"),
        ({"files": None}, 400, None),
        ({"files": None, "data": None, "json": {"purpose": "fine-tune"}}, 400, None),
    ],
)
def test_an_invalid_upload_is_refused_and_leaves_no_file(
    client: httpx.Client,
    new_files: NewFiles,
    changes: dict[str, object],
    status: int,
    param: str | None,
) -> None:
    answer = upload(client, **changes)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert new_files() == set()
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nrow\r\n',
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nrow\r\n--b--\r\n',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nrow\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="' + b"x" * 10_000,
        b"no boundary at all",
        b"",
    ],
)
def test_a_malformed_form_is_refused_and_leaves_no_file(
    client: httpx.Client, new_files: NewFiles, body: bytes
) -> None:
    answer = client.post(
        "/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert new_files() == set()


def test_the_key_is_checked_before_a_byte_of_the_body(url: str) -> None:
    """The response comes after the headers only, without the 300 MB that they announce."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer heft_wrong\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 300000000\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_an_upload_of_a_disconnected_client_leaves_no_file(
    client: httpx.Client, new_files: NewFiles, url: str
) -> None:
    address = urlsplit(url)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            + f"Authorization: {client.headers['Authorization']}\r\n".encode()
            + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            + head
            + ROW
        )
        while not new_files():  # pytest's timeout is the deadline
            pass
    while new_files():
        pass
    assert client.get("/v1/files").json()["data"] == []


def test_a_body_without_a_length_is_counted_while_it_is_read(
    client: httpx.Client, new_files: NewFiles
) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(200):
            yield ROW * 1_000

    answer = client.post(
        "/v1/files", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code == 413
    assert new_files() == set()


class TestIdempotency:
    KEY = {"Idempotency-Key": "once"}  # noqa: RUF012

    def test_a_repeated_upload_is_the_same_file(self, client: httpx.Client, new_files: NewFiles) -> None:
        first = upload(client, headers=self.KEY).json()
        assert upload(client, headers=self.KEY).json() == first
        assert len(new_files()) == 1

    def test_eight_concurrent_requests_create_one_file(
        self, client: httpx.Client, new_files: NewFiles
    ) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: upload(client, headers=self.KEY), range(8)))
        assert {answer.json()["id"] for answer in answers} == {answers[0].json()["id"]}
        assert len(client.get("/v1/files").json()["data"]) == 1
        assert len(new_files()) == 1

    @pytest.mark.parametrize(
        "file", [("rows.jsonl", ROW + ROW), ("other.jsonl", ROW)], ids=["content", "file name"]
    )
    def test_another_upload_under_the_same_key_is_refused(
        self, client: httpx.Client, new_files: NewFiles, file: tuple[str, bytes]
    ) -> None:
        upload(client, headers=self.KEY)
        answer = upload(client, headers=self.KEY, files={"file": file})
        assert answer.status_code == 409
        assert answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "idempotency_key_reused"
        assert len(new_files()) == 1

    def test_idempotency_keys_are_separate_for_owners(
        self, client: httpx.Client, stranger: httpx.Client
    ) -> None:
        assert upload(client, headers=self.KEY).status_code == 200
        assert upload(stranger, b"other" + ROW, headers=self.KEY).status_code == 200
