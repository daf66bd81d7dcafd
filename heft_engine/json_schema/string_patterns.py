"""Regular expressions of JSON schemas, in the form that a grammar of JSON text holds exactly.

A grammar writes a string's characters as they are, between quotes: every character set is cut down to those that JSON
needs no escape for. Shorthands (`\\d`, `\\w`, `\\s` and their complements) are ASCII's, as in ECMA 262, so that a
string matches under every dialect. A pattern is matched in whole, as if it stood between `^` and `$`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Largest count of a repetition, and largest size of a pattern with its repetitions written out: some seconds of
#: compilation.
MAX_REPEAT = 500
MAX_SIZE = 1_500
#: Longest pattern as it is written.
MAX_CHARACTERS = 1_000
#: Largest size of a repetition with another one in it, written out. `((a|ab|abc){0,10}){0,10}` matches a text in so
#: many ways that a decoding step takes half a second.
MAX_NESTED_SIZE = 200
#: Counted for a repetition without an upper bound that has another one in it.
_UNBOUNDED = 10
#: Size of a character set beyond ASCII, whose UTF-8 bytes are an automaton of their own.
_WIDE_SIZE = 4
_MAX_DEPTH = 20
#: Matches nothing. Its letter makes xgrammar 0.2.9 turn the pattern into rules of its grammar: as an automaton it would
#: match too much, `((c{2,})?)?` a single c, and `((a(a|)|a)((a(a|)|a)|)|)` five a.
_AS_RULES = "é{0,0}"

_LAST = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]


class PatternError(ValueError):
    """A regular expression that a grammar can't hold. The message says which part and what to do."""


@dataclass(frozen=True, kw_only=True)
class StringPattern:
    """A regular expression for xgrammar, with the lengths of the strings that it matches in characters (None: no
    maximum) and its size with all repetitions written out."""

    text: str
    min_length: int
    max_length: int | None
    size: int
    has_repetition: bool = False


def parse_pattern(pattern: str) -> StringPattern:
    """Returns a schema's `pattern` in xgrammar's form. Raises PatternError."""
    if len(pattern) > MAX_CHARACTERS:
        raise PatternError(f"it is longer than {MAX_CHARACTERS:,} characters")
    parsed = _Parser(pattern).parse()
    if parsed.size > MAX_SIZE:
        raise PatternError(
            f"its repetitions written out are larger than {MAX_SIZE:,} characters: use smaller counts, or maxLength "
            "instead of a pattern"
        )
    return StringPattern(
        text=f"^{_AS_RULES}({parsed.text})$",
        min_length=parsed.min_length,
        max_length=parsed.max_length,
        size=parsed.size,
    )


_SIGNS: dict[tuple[int, int | None], str] = {(0, None): "*", (1, None): "+", (0, 1): "?"}


class _Parser:
    """Reads a regular expression by recursive descent and writes it again, with explicit character sets."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0
        self._depth = 0

    def parse(self) -> StringPattern:
        parsed = self._alternatives()
        if self._position < len(self._pattern):
            raise PatternError("a ) has no ( before it")
        return parsed

    @property
    def _next(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _take(self, text: str) -> bool:
        """Moves on over `text` if it comes next."""
        if not self._pattern.startswith(text, self._position):
            return False
        self._position += len(text)
        return True

    def _alternatives(self) -> StringPattern:
        branches = [self._branch()]
        while self._take("|"):
            branches.append(self._branch())
        maxima = [branch.max_length for branch in branches]
        text = "|".join(branch.text for branch in branches if branch.text)
        if text and not all(branch.text for branch in branches):
            text = f"({text})?"
        return StringPattern(
            text=text,
            min_length=min(branch.min_length for branch in branches),
            max_length=max(m for m in maxima if m is not None) if None not in maxima else None,
            size=sum(branch.size for branch in branches),
            has_repetition=any(branch.has_repetition for branch in branches),
        )

    def _branch(self) -> StringPattern:
        """Reads a sequence; one of the outermost may begin with `^` and end with `$`."""
        is_outermost = self._depth == 0
        if is_outermost:
            self._take("^")
        pieces: list[StringPattern] = []
        while self._next not in ("", "|", ")"):
            if self._next == "$" and is_outermost and self._pattern[self._position + 1 :][:1] in ("", "|"):
                self._position += 1
                break
            pieces.append(self._repeated(self._atom()))
        return _sequence(pieces)

    def _repeated(self, atom: StringPattern) -> StringPattern:
        counts = self._counts()
        if counts is None:
            return atom
        self._take("?")  # a lazy repetition matches the same strings
        if self._next and self._next in "*+?{":
            raise PatternError("two repetitions follow each other: put the first one into a group")
        least, most = counts
        if max(least, most or 0) > MAX_REPEAT:
            raise PatternError(
                f"a repetition may count up to {MAX_REPEAT}: use maxLength instead of a pattern"
            )
        if atom.text == "" or most == 0:
            return _sequence([])
        unbounded = _UNBOUNDED if atom.has_repetition else 1
        size = atom.size * max(1, least, unbounded if most is None else most)
        if atom.has_repetition and size > MAX_NESTED_SIZE:
            raise PatternError(
                f"a repetition in another one, both written out, may have {MAX_NESTED_SIZE} characters: use smaller "
                "counts"
            )
        return StringPattern(
            text=atom.text + _SIGNS.get(counts, f"{{{least},{'' if most is None else most}}}"),
            min_length=least * atom.min_length,
            max_length=None if most is None or atom.max_length is None else most * atom.max_length,
            size=size,
            has_repetition=atom.has_repetition or most != 1,
        )

    def _counts(self) -> tuple[int, int | None] | None:
        """Reads a repetition's counts; None without one."""
        for counts, sign in _SIGNS.items():
            if self._take(sign):
                return counts
        if not self._take("{"):
            return None
        end = self._pattern.find("}", self._position)
        least, comma, most = self._pattern[self._position : end].partition(",")
        numbers = [least, *([most] if most else [])]
        if end < 0 or not all(n.isascii() and n.isdecimal() and len(n) < 7 for n in numbers):
            raise PatternError("a { begins no repetition such as {2,5}: write \\{ for the character")
        self._position = end + 1
        lower, upper = int(least), int(most) if most else (None if comma else int(least))
        if upper is not None and upper < lower:
            raise PatternError(f"the repetition {{{least},{most}}} has its larger count first")
        return lower, upper

    def _atom(self) -> StringPattern:
        character = self._next
        if character == "(":
            return self._group()
        if character in ("*", "+", "?"):
            raise PatternError(f"nothing comes before the repetition {character}")
        if character in ("^", "$"):
            raise PatternError(f"{character} is supported at the ends of a pattern alone")
        self._position += 1
        if character == "[":
            return _one_of(self._set())
        if character == ".":
            return _one_of(((0, _LAST),))
        if character == "\\":
            return _one_of(self._escape()[0])
        return _one_of(_single(character))

    def _group(self) -> StringPattern:
        self._position += 1
        if self._take("?") and not self._take(":"):
            self._take("P")
            end = self._pattern.find(">", self._position)
            name = self._pattern[self._position : end]
            if end < 0 or not (name.startswith("<") and name[1:].isidentifier()):
                raise PatternError(
                    "lookaround and flags are not supported: only (...), (?:...) and (?<name>...)"
                )
            self._position = end + 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"groups are nested more than {_MAX_DEPTH} deep")
        inner = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise PatternError("a ( has no ) after it")
        return StringPattern(
            text=f"({inner.text})" if inner.text else "",
            min_length=inner.min_length,
            max_length=inner.max_length,
            size=inner.size,
            has_repetition=inner.has_repetition,
        )

    def _set(self) -> Ranges:
        is_negated = self._take("^")
        members: list[tuple[int, int]] = []
        has_shorthand = False
        while not self._take("]"):
            ranges, is_shorthand = self._member()
            has_shorthand |= is_shorthand
            if self._next == "-" and self._pattern[self._position + 1 :][:1] not in ("]", ""):
                self._position += 1
                upper, is_upper_shorthand = self._member()
                if is_shorthand or is_upper_shorthand or upper[0][0] < ranges[0][0]:
                    raise PatternError("a range such as a-z needs two characters in ascending order")
                ranges = ((ranges[0][0], upper[0][0]),)
            members += ranges
        if not members:
            raise PatternError("a character set is empty")
        if not is_negated:
            return tuple(members)
        return _complement(members, last=0x7F if has_shorthand else _LAST)

    def _member(self) -> tuple[Ranges, bool]:
        """Reads one member of a character set; returns True beside it for a shorthand."""
        character = self._next
        if character == "":
            raise PatternError("a [ has no ] after it")
        self._position += 1
        return self._escape() if character == "\\" else (_single(character), False)

    def _escape(self) -> tuple[Ranges, bool]:
        """Reads what follows a backslash; returns True beside it for a shorthand."""
        character = self._next
        self._position += 1
        if character in _SHORTHANDS:
            return _SHORTHANDS[character], True
        if character in _CONTROLS:
            return _single(_CONTROLS[character]), False
        for letter, digits in (("x", 2), ("u", 4)):
            if character == letter:
                code = self._pattern[self._position : self._position + digits]
                if len(code) < digits or not all(digit in "0123456789abcdefABCDEF" for digit in code):
                    raise PatternError(f"\\{letter} needs {digits} hexadecimal digits")
                self._position += digits
                return ((int(code, 16), int(code, 16)),), False
        if character == "" or (character.isascii() and character.isalnum()):
            raise PatternError(f"the escape \\{character} is not supported")
        return _single(character), False


def _single(character: str) -> Ranges:
    return ((ord(character), ord(character)),)


def _complement(ranges: Iterable[tuple[int, int]], *, last: int) -> Ranges:
    gaps, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            gaps.append((start, min(low - 1, last)))
        start = max(start, high + 1)
    if start <= last:
        gaps.append((start, last))
    return tuple((low, high) for low, high in gaps if low <= high)


_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = (*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_SHORTHANDS: dict[str, Ranges] = {
    "d": _DIGITS,
    "D": _complement(_DIGITS, last=0x7F),
    "w": _WORD,
    "W": _complement(_WORD, last=0x7F),
    "s": _SPACE,
    "S": _complement(_SPACE, last=0x7F),
}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
#: Characters that JSON writes with an escape, and surrogates, which are none.
_ESCAPED_IN_JSON: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF))


def _sequence(pieces: list[StringPattern]) -> StringPattern:
    maxima = [piece.max_length for piece in pieces]
    return StringPattern(
        text="".join(piece.text for piece in pieces),
        min_length=sum(piece.min_length for piece in pieces),
        max_length=sum(m for m in maxima if m is not None) if None not in maxima else None,
        size=sum(piece.size for piece in pieces),
        has_repetition=any(piece.has_repetition for piece in pieces),
    )


def _one_of(ranges: Ranges) -> StringPattern:
    """Returns a set of those characters of `ranges` that JSON does not escape."""
    outside = _complement(ranges, last=_LAST)
    excluded = (*outside, *_ESCAPED_IN_JSON)
    allowed = _complement(excluded, last=_LAST)
    if not allowed:
        raise PatternError(
            "it needs a quote, a backslash or a control character, which strings here don't hold"
        )
    is_wide = allowed[-1][1] > 0x7F
    if len(allowed) == 1 and allowed[0][0] == allowed[0][1] and chr(allowed[0][0]).isalnum() and not is_wide:
        return StringPattern(text=chr(allowed[0][0]), min_length=1, max_length=1, size=1)
    if allowed[-1][1] == _LAST:
        # Ranges up to the last character are written as what they leave out.
        merged = _complement(allowed, last=_LAST)
        text = "[^" + _written(range_ for range_ in merged if range_ != (0xD800, 0xDFFF)) + "]"
    else:
        text = f"[{_written(allowed)}]"
    return StringPattern(text=text, min_length=1, max_length=1, size=_WIDE_SIZE if is_wide else 1)


def _written(ranges: Iterable[tuple[int, int]]) -> str:
    """Returns the inside of a character set."""
    return "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in ranges)


def _code(code: int) -> str:
    r"""Returns a character within a set. xgrammar reads any number of digits after \x, and four after \u."""
    character = chr(code)
    if character in r"\^$.*+?()[]{}|/-":
        return f"\\{character}"
    return f"\\u{code:04x}" if code < 0x20 or code == 0x7F else character
