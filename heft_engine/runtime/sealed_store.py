"""A store whose values are authenticated: the processes of a group find each other's addresses in it."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from heft_engine.runtime.messages import Authenticator


class SealedStore(Store):
    """A view of a store, in which each value is sealed for its name. Numbers that are added to are not.

    torch keeps process groups' stores on its C++ side, and calls these methods from there: it implements those that
    gloo and NCCL need. A reference to this object must be kept as long as its groups.
    """

    def __init__(self, store: Store, authenticator: Authenticator) -> None:
        super().__init__()
        self._store = store
        self._authenticator = authenticator

    def set(self, key: str, value: str | bytes) -> None:
        payload = value.encode() if isinstance(value, str) else value
        self._store.set(key, self._authenticator.seal(_context(key), payload).hex())

    def get(self, key: str) -> bytes:
        """Returns the value of a name, once it is there. Raises ForgedMessage for one that was not sealed for it."""
        stored = self._store.get(key)
        try:
            message = bytes.fromhex(stored.decode())
        except ValueError:
            message = b""  # nothing that was sealed
        return self._authenticator.open(_context(key), message)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self._store.wait(keys)
        else:
            self._store.wait(keys, timeout)


def _context(key: str) -> str:
    return f"store {key}"
