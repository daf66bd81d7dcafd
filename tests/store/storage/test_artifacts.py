"""Bytes by key, the same on a local disk and on S3 (as moto serves it): whole or not at all, and verified."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from store.errors import Damaged, InvalidRequest, Unavailable
from store.storage.artifacts import Artifacts, attempt_prefix, export_key, file_key

_BUCKET = "heft"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 on loopback, with a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=_BUCKET)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def artifacts(request: pytest.FixtureRequest, artifacts_url: str) -> Artifacts:
    if request.param == "file":
        return Artifacts(artifacts_url)
    request.getfixturevalue("s3")
    prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]
    return Artifacts(f"s3://{_BUCKET}/{prefix}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in folders, one of them empty, as a trainer writes them."""
    folder = tmp_path / "checkpoint"
    (folder / "bundle" / "reft").mkdir(parents=True)
    (folder / "state.bin").write_bytes(os.urandom(3_000_000))
    (folder / "bundle" / "heft.json").write_text("{}")
    (folder / "bundle" / "reft" / "empty.txt").write_bytes(b"")
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_put_is_what_is_read(artifacts: Artifacts, tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(data)
    assert artifacts.put_file("files/a", source) == sha256(data)
    assert artifacts.put_stream("files/b", iter([data[:10], b"", data[10:]])) == sha256(data)
    for key in ("files/a", "files/b"):
        chunks = list(artifacts.iter_bytes(key))
        assert b"".join(chunks) == data
        assert max(map(len, chunks)) <= 1024 * 1024
        with artifacts.open(key) as file:
            file.seek(-5, os.SEEK_END)
            assert file.read() == data[-5:]
    artifacts.fetch_file("files/a", tmp_path / "copy", sha256(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert artifacts.children("files") == ["a", "b"]
    assert -1 < artifacts.age_seconds("files/a") < 120


def test_a_file_of_several_parts_is_whole(artifacts: Artifacts) -> None:
    piece = os.urandom(1024 * 1024)
    upload = artifacts.upload("files/large")
    for _ in range(35):  # more than two parts of a multipart upload
        upload.write(piece)
    assert artifacts.children("files") == []  # nobody sees it before the commit
    assert upload.size == 35 * len(piece)
    digest = upload.commit()
    assert digest == sha256(piece * 35)
    assert sha256(b"".join(artifacts.iter_bytes("files/large"))) == digest


def test_an_empty_file_is_a_file(artifacts: Artifacts) -> None:
    assert artifacts.put_stream("files/empty", []) == sha256(b"")
    assert list(artifacts.iter_bytes("files/empty")) == []
    assert artifacts.children("files") == ["empty"]


@pytest.mark.parametrize("size", [10, 20 * 1024 * 1024])
def test_an_upload_that_breaks_off_leaves_nothing(artifacts: Artifacts, size: int) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(2):
            yield b"x" * size
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        artifacts.put_stream("files/broken", chunks())
    assert artifacts.children("files") == []
    with pytest.raises(Damaged):
        artifacts.open("files/broken").read()


def test_a_directory_comes_back_verified(artifacts: Artifacts, folder: Path, tmp_path: Path) -> None:
    manifest = artifacts.put_directory("jobs/j/1/step-10", folder)
    assert manifest == {
        name: sha256((folder / name).read_bytes())
        for name in ("bundle/heft.json", "bundle/reft/empty.txt", "state.bin")
    }
    stored = json.loads(b"".join(artifacts.iter_bytes("jobs/j/1/step-10/manifest.json")))
    assert stored == manifest
    target = tmp_path / "deep" / "copy"
    artifacts.fetch_directory("jobs/j/1/step-10", target, manifest)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(
        manifest
    )
    assert (target / "state.bin").read_bytes() == (folder / "state.bin").read_bytes()
    part = {name.removeprefix("bundle/"): digest for name, digest in manifest.items() if "bundle/" in name}
    artifacts.fetch_directory("jobs/j/1/step-10/bundle", tmp_path / "bundle", part)
    assert (tmp_path / "bundle" / "heft.json").read_text() == "{}"


def test_a_directorys_own_manifest_is_kept_and_written_last(artifacts: Artifacts, folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')
    manifest = artifacts.put_directory("jobs/j/1/c", folder)
    assert list(manifest)[-1] == "manifest.json"
    assert b"".join(artifacts.iter_bytes("jobs/j/1/c/manifest.json")) == b'{"files": {}}'


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_damage_is_noticed_and_nothing_half_is_left(
    artifacts: Artifacts, folder: Path, tmp_path: Path, damage: str
) -> None:
    manifest = artifacts.put_directory("jobs/j/1/c", folder)
    artifacts.delete("jobs/j/1/c/state.bin")
    if damage != "missing":
        data = (folder / "state.bin").read_bytes()
        spoilt = data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1])
        artifacts.put_stream("jobs/j/1/c/state.bin", [spoilt])
    with pytest.raises(Damaged, match=r"state\.bin"):
        artifacts.fetch_directory("jobs/j/1/c", tmp_path / "copy", manifest)
    with pytest.raises(Damaged):
        artifacts.fetch_file("jobs/j/1/c/state.bin", tmp_path / "one", manifest["state.bin"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "checkpoint"]


def test_deleting_takes_a_file_or_all_under_a_prefix(artifacts: Artifacts, folder: Path) -> None:
    artifacts.put_directory("jobs/j/1/c", folder)
    artifacts.put_directory("jobs/j/10/c", folder)
    artifacts.delete("jobs/j/1")
    assert artifacts.children("jobs/j") == ["10"]
    assert artifacts.children("jobs/j/10/c") == ["bundle", "manifest.json", "state.bin"]
    artifacts.delete("jobs/j/10/c/state.bin")
    assert artifacts.children("jobs/j/10/c") == ["bundle", "manifest.json"]
    artifacts.delete("jobs/j/1")  # again: nothing to do
    assert artifacts.children("nothing/here") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a//b",
        "a/",
        ".",
        "a/./b",
        "a\x00b",
        "a\\b",
        "~/a",
        ".incomplete/x",
    ],
)
def test_a_key_that_could_leave_the_root_is_refused(artifacts: Artifacts, tmp_path: Path, key: str) -> None:
    for call in (
        lambda: artifacts.put_stream(key, [b"x"]),
        lambda: artifacts.open(key),
        lambda: artifacts.delete(key),
        lambda: artifacts.children(key),
        lambda: artifacts.fetch_directory("a", tmp_path / "copy", {key: sha256(b"")}),
    ):
        with pytest.raises(InvalidRequest):
            call()


@pytest.fixture
def s3_away(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Artifacts]:
    """The same storage while nobody listens there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()  # fsspec gives equal addresses the connection they had
    yield Artifacts(f"s3://{_BUCKET}/away")
    S3FileSystem.clear_instance_cache()


def test_a_storage_that_is_away_is_unavailable(s3_away: Artifacts) -> None:
    for call in (
        lambda: s3_away.put_stream("a", [b"x"]),
        lambda: s3_away.open("a").read(),
        lambda: s3_away.children("a"),
        lambda: s3_away.delete("a"),
    ):
        with pytest.raises(Unavailable):
            call()


def test_a_full_disk_is_unavailable(artifacts_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    artifacts = Artifacts(artifacts_url)
    artifacts.put_stream("files/first", [b"x"])
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(Unavailable, match="No space left"):
        artifacts.put_stream("files/second", [b"x"])
    assert artifacts.children("files") == ["first"]
    assert list((Path(artifacts_url.removeprefix("file://")) / ".incomplete").iterdir()) == []


def test_what_is_held_back_for_a_full_disk_is_unavailable_too(artifacts_url: str) -> None:
    """Small writes wait in memory: the disk refuses them when they are flushed, and again when the file is closed."""
    artifacts = Artifacts(artifacts_url)
    artifacts.put_stream("files/first", [b"x"])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        with pytest.raises(Unavailable, match="File too large"):
            artifacts.put_stream("files/second", [b"x"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert artifacts.children("files") == ["first"]
    assert list((Path(artifacts_url.removeprefix("file://")) / ".incomplete").iterdir()) == []


def test_what_a_killed_upload_left_is_removed_when_it_is_old(artifacts_url: str) -> None:
    artifacts = Artifacts(artifacts_url)
    incomplete = Path(artifacts_url.removeprefix("file://")) / ".incomplete"
    killed = artifacts.upload("files/dead")
    killed.write(b"x")
    assert len(list(incomplete.iterdir())) == 1
    artifacts.delete_incomplete(older_than_seconds=3600)
    assert len(list(incomplete.iterdir())) == 1
    artifacts.delete_incomplete(older_than_seconds=0)
    assert list(incomplete.iterdir()) == []
    killed.abort()


def test_keys_of_the_service_are_keys(artifacts: Artifacts) -> None:
    keys = [
        file_key("file-abc"),
        f"{attempt_prefix('ftjob-x', 3)}/bundle",
        export_key("ftjob-x", "lora", "peft", 1),
    ]
    for key in keys:
        artifacts.put_stream(key, [b"x"])
    assert artifacts.children("jobs/ftjob-x/3") == ["bundle"]
