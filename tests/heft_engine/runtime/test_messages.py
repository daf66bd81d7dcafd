"""Messages between ranks: nothing is read that was not sealed with the run's secret, in this place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from heft_engine.errors import ForgedMessage
from heft_engine.runtime import messages
from heft_engine.runtime.distributed import Ranks
from heft_engine.runtime.messages import Authenticator, MessageChannel

AUTHENTICATOR = Authenticator(secret="s" * 64)


def test_a_sealed_message_is_opened_in_its_context_alone() -> None:
    sealed = AUTHENTICATOR.seal("broadcast 1", b"payload")
    assert AUTHENTICATOR.open("broadcast 1", sealed) == b"payload"
    with pytest.raises(ForgedMessage, match="private network"):
        AUTHENTICATOR.open("broadcast 2", sealed)
    with pytest.raises(ForgedMessage):
        Authenticator(secret="t" * 64).open("broadcast 1", sealed)
    assert "s" * 64 not in repr(AUTHENTICATOR)


@pytest.mark.parametrize("position", [0, 6, 7, 38])
def test_a_message_with_one_changed_byte_is_forged(position: int) -> None:
    sealed = bytearray(AUTHENTICATOR.seal("broadcast 1", b"payload"))
    sealed[position] ^= 1
    with pytest.raises(ForgedMessage):
        AUTHENTICATOR.open("broadcast 1", bytes(sealed))


@pytest.mark.parametrize("message", [b"", b"short", b"\x80\x04\x95 a pickle"])
def test_a_message_without_a_code_is_forged(message: bytes) -> None:
    with pytest.raises(ForgedMessage):
        AUTHENTICATOR.open("broadcast 1", message)


def test_context_and_payload_can_not_be_shifted_into_each_other() -> None:
    assert AUTHENTICATOR.code("broadcast 1", b"1") != AUTHENTICATOR.code("broadcast 11", b"")


class Wire:
    """The broadcasts of rank 0 to one other rank, in this process: first all are sent, then all are received."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.receiving = False

    def broadcast(self, tensor: Tensor, src: int, group: Any) -> None:
        if self.receiving:
            tensor.copy_(torch.frombuffer(bytearray(self.sent.pop(0)), dtype=torch.uint8))
        else:
            self.sent.append(tensor.numpy().tobytes())


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(dist, "broadcast", wire.broadcast)
    return wire


def pair() -> tuple[Ranks, Ranks]:
    first, second = (
        Ranks(
            rank=rank,
            size=2,
            _messages=MessageChannel(authenticator=AUTHENTICATOR, rank=rank, size=2, group=None),
        )
        for rank in range(2)
    )
    return first, second


def test_values_arrive_as_json(wire: Wire) -> None:
    first, second = pair()
    values = [{"a": [1, 0.1, None]}, "text", None]
    for value in values:
        first.send(value)
    wire.receiving = True
    assert [second.receive() for _ in values] == values


def test_a_message_that_is_repeated_is_forged(wire: Wire) -> None:
    first, second = pair()
    first.send("a value")
    wire.sent *= 2
    wire.receiving = True
    assert second.receive() == "a value"
    with pytest.raises(ForgedMessage):
        second.receive()


def test_a_forged_length_takes_no_memory(wire: Wire) -> None:
    first, second = pair()
    first.send("a value")
    wire.sent[0] = b"\x7f" * len(wire.sent[0])
    wire.receiving = True
    with pytest.raises(ForgedMessage):
        second.receive()


def test_a_directory_arrives_whole_and_in_parts(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "FILE_PART_BYTES", 7)
    contents = {"state.json": b"{}", "stages/lora/weights": bytes(range(30)), "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first, second = pair()
    with first.shared_directory(tmp_path) as path:
        assert path == tmp_path
    wire.receiving = True
    with second.shared_directory(None) as copy:
        assert copy is not None
        assert copy != tmp_path
        assert {name: (copy / name).read_bytes() for name in contents} == contents
    assert not copy.exists()


def test_a_directory_that_is_not_there_is_told(wire: Wire, tmp_path: Path) -> None:
    first, second = pair()
    with first.shared_directory(None) as path:
        assert path is None
    wire.receiving = True
    with second.shared_directory(tmp_path) as copy:
        assert copy is None
