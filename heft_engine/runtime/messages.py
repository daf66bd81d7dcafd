"""Messages between the ranks of a run, authenticated by its secret before they are read: HMAC-SHA256 (RFC 2104).

A message is bytes: JSON, or a part of a file. Nothing that arrives is ever unpickled. Tensors of gradients and sums are
numbers alone, and travel beside these messages.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heft_engine.errors import ForgedMessage

#: Characters that a secret has at least, of whatever alphabet.
SECRET_CHARACTERS = 32
_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH_BYTES = 8
#: Files travel in parts of this size.
FILE_PART_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Authenticator:
    """Computes and checks the codes of messages. Codes of one context are not valid in another."""

    secret: str = field(repr=False)

    def code(self, context: str, payload: bytes) -> bytes:
        """Returns the HMAC-SHA256 of a payload in its context: 32 bytes."""
        name = context.encode()
        parts = len(name).to_bytes(_LENGTH_BYTES, "big"), name, payload
        return hmac.digest(self.secret.encode(), b"".join(parts), hashlib.sha256)

    def seal(self, context: str, payload: bytes) -> bytes:
        """Returns the payload with its code behind it."""
        return payload + self.code(context, payload)

    def open(self, context: str, message: bytes) -> bytes:
        """Returns the payload of a sealed message. Raises ForgedMessage for one that was not sealed like this."""
        payload, code = message[:-_MAC_BYTES], message[-_MAC_BYTES:]
        if not hmac.compare_digest(code, self.code(context, payload)):
            explanation = (
                "a message between the training processes is not authentic: somebody else has reached their ports. "
                "Give these machines a private network, and continue from the last checkpoint"
            )
            raise ForgedMessage(explanation)
        return payload


@dataclass(kw_only=True)
class MessageChannel:
    """Messages among all ranks, which make the same calls in the same order. `count` numbers the calls.

    The number is part of each message's context, so a message that is repeated later is not authentic.
    """

    authenticator: Authenticator
    rank: int
    size: int
    group: dist.ProcessGroup | None
    count: int = 0

    def send(self, payload: bytes) -> None:
        """Sends bytes from rank 0 to all other ranks, which call `receive`."""
        context = self._next_context("broadcast")
        length = len(payload).to_bytes(_LENGTH_BYTES, "big")
        self._broadcast(_to_tensor(self.authenticator.seal(f"{context} length", length)))
        self._broadcast(_to_tensor(self.authenticator.seal(context, payload)))

    def receive(self) -> bytes:
        """Returns what rank 0 sends. Raises ForgedMessage."""
        context = self._next_context("broadcast")
        header = self._broadcast(torch.empty(_LENGTH_BYTES + _MAC_BYTES, dtype=torch.uint8))
        # A forged length would otherwise decide how much memory is taken.
        length = int.from_bytes(self.authenticator.open(f"{context} length", _to_bytes(header)), "big")
        body = self._broadcast(torch.empty(length + _MAC_BYTES, dtype=torch.uint8))
        return self.authenticator.open(context, _to_bytes(body))

    def gather(self, payload: bytes) -> list[bytes]:
        """Returns the payloads of all ranks, which have the same length, by rank. Raises ForgedMessage."""
        context = self._next_context("gather")
        sealed = _to_tensor(self.authenticator.seal(f"{context} {self.rank}", payload))
        messages = [torch.empty_like(sealed) for _ in range(self.size)]
        dist.all_gather(messages, sealed, group=self.group)
        return [
            self.authenticator.open(f"{context} {rank}", _to_bytes(message))
            for rank, message in enumerate(messages)
        ]

    def _broadcast(self, message: Tensor) -> Tensor:
        dist.broadcast(message, src=0, group=self.group)
        return message

    def _next_context(self, kind: str) -> str:
        self.count += 1
        return f"{kind} {self.count}"


def file_list(directory: Path) -> list[dict[str, Any]]:
    """Returns the files of a directory and its folders: {path, bytes}, the path relative to it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [{"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size} for path in paths]


def file_parts(path: Path, size: int) -> Iterator[bytes]:
    """Yields a file's content in parts. Raises OSError for a file that has become shorter."""
    with path.open("rb") as file:
        for length in part_lengths(size):
            part = file.read(length)
            if len(part) != length:
                raise OSError(f"{path} has become shorter while it was sent to the other ranks")
            yield part


def part_lengths(size: int) -> list[int]:
    """Returns the lengths of the parts in which `size` bytes travel."""
    whole, rest = divmod(size, FILE_PART_BYTES)
    return [FILE_PART_BYTES] * whole + ([rest] if rest else [])


def _to_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
