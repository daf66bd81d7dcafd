"""Incremental detokenisation: text that is certain, never half a character, and the bytes of single tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: A character has at most four bytes and a token at least one; after so many tokens the bytes are no character.
_MAX_PENDING_TOKENS = 8


class Detokenizer:
    """Decodes one sequence token by token; the pieces joined are the text of all its tokens.

    `visible` are special tokens that are a part of the text, as those that mark tool calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visible: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._visible = visible
        self._tokens: list[int] = []
        # A token's text may depend on the one before it, so decoding starts a little to the left of what is new.
        self._prefix_offset = 0
        self._read_offset = 0

    def push(self, token: int) -> str:
        """Returns the text that has become certain with this token."""
        self._tokens.append(token)
        if len(self._tokens) - self._read_offset > _MAX_PENDING_TOKENS:
            return self.flush()
        return self._decode(only_certain=True)

    def flush(self) -> str:
        """Returns the rest, incomplete characters included."""
        return self._decode(only_certain=False)

    def _decode(self, *, only_certain: bool) -> str:
        prefix = decode(self._tokenizer, self._tokens[self._prefix_offset : self._read_offset], self._visible)
        text = decode(self._tokenizer, self._tokens[self._prefix_offset :], self._visible)
        if only_certain and (text.endswith(_REPLACEMENT) or len(text) <= len(prefix)):
            return ""
        self._prefix_offset, self._read_offset = self._read_offset, len(self._tokens)
        return text[len(prefix) :]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], visible: Collection[int] = ()) -> str:
    """Returns the tokens' text as it is: without special tokens but those that are `visible`, with all spaces."""
    if visible:
        added = tokenizer.added_tokens_decoder
        shown = [t for t in tokens if t in visible or t not in added or not added[t].special]
        return str(tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Vocabulary:
    """Single tokens as bytes, for log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        """Returns a token's bytes, which may be a part of a character."""
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
    """Returns the byte of each letter in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
