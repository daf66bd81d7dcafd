"""Tokens as text and as bytes, while more of them come: never half a character, never more than is certain.

It does NOT know models, stop strings or requests.
"""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: A character has at most four bytes, a token at least one: what is broken for so long is no character to wait for.
_PATIENCE = 8


class Detokenizer:
    """One sequence's text, piece by piece: the pieces are the text of all its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Decoding starts a little to the left of what is new: a token's text may depend on the one before it.
        self._start = 0
        self._told = 0

    def push(self, token: int) -> str:
        """What has become certain with this token."""
        self._tokens.append(token)
        if len(self._tokens) - self._told > _PATIENCE:
            return self.flush()
        return self._new(certain=True)

    def flush(self) -> str:
        """The rest, broken or not."""
        return self._new(certain=False)

    def _new(self, *, certain: bool) -> str:
        before = decode(self._tokenizer, self._tokens[self._start : self._told])
        text = decode(self._tokenizer, self._tokens[self._start :])
        if certain and (text.endswith(_BROKEN) or len(text) <= len(before)):
            return ""
        self._start, self._told = self._told, len(self._tokens)
        return text[len(before) :]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Text as the tokens say it: no special tokens, no spaces tidied away."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Vocabulary:
    """What single tokens are, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """A part of a character, too."""
        if token in self._tokenizer.all_special_ids:
            return cast(str, self._tokenizer.convert_ids_to_tokens(token)).encode()
        name = cast(str | None, self._tokenizer.convert_ids_to_tokens(token)) or ""
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        letters = _byte_letters()
        if self._is_byte_level and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name)
        return name.replace("▁", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
