"""Patterns in xgrammar's form: they match what they did, within what JSON writes without escapes."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
import xgrammar

from heft_engine.json_schema.string_formats import FORMATS, format_pattern
from heft_engine.json_schema.string_patterns import MAX_REPEAT, MAX_SIZE, PatternError, parse_pattern

#: A vocabulary of single bytes.
BYTES = xgrammar.TokenizerInfo(
    [bytes([byte]) for byte in range(256)] + [b""], xgrammar.VocabType.RAW, stop_token_ids=[256]
)
COMPILER = xgrammar.GrammarCompiler(BYTES, max_threads=1, cache_enabled=False)


def matcher_of(pattern: str) -> xgrammar.GrammarMatcher:
    schema = {"type": "string", "pattern": parse_pattern(pattern).text}
    return xgrammar.GrammarMatcher(COMPILER.compile_json_schema(schema))


def matches(matcher: xgrammar.GrammarMatcher, text: str) -> bool:
    matcher.reset()
    accepted: bool = matcher.accept_string(json.dumps(text, ensure_ascii=False))
    return accepted and matcher.is_completed()


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    choice = rng.random()
    if depth == 0 or choice < 0.3:
        return rng.choice(["a", "b", "c", "[ab]", "[^a]", r"\w"])
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if choice < 0.5:
        return f"({''.join(parts)})"
    if choice < 0.65:
        return f"({'|'.join(parts)})"
    return f"({parts[0]}){rng.choice(['*', '+', '?', '{0,2}', '{1,2}', '{2,}', '{2}', '*?', '{2,3}?'])}"


def test_random_patterns_match_what_python_matches() -> None:
    rng = random.Random(5)
    texts = ["".join(letters) for length in range(5) for letters in itertools.product("abc", repeat=length)]
    compared = 0
    while compared < 150:
        pattern = random_pattern(rng)
        try:
            matcher = matcher_of(pattern)
        except PatternError:
            continue
        compared += 1
        for text in texts:
            assert matches(matcher, text) == bool(re.fullmatch(pattern, text)), (pattern, text)


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (r"^\d{2}[-/]\d{2}$", ["12-34", "12/34"], ["12.34", "1-2", "١٢-٣٤"]),
        ("^a.c$", ["abc", "aéc", "a日c", "a c", "a\x7fc"], ["ac", 'a"c', "a\\c", "a\nc"]),
        (r"^[^\d]$", ["a", "-"], ["1", "é", '"']),
        (r"^\S\D\W$", ["ab-", "!!!"], [" b-", "a1-", "abc", "é!!"]),
        (r"^a\s?b$", ["ab", "a b"], ["a\tb"]),
        (r"^[\]\-^\\a]$", ["]", "-", "^", "a"], ["\\", "b"]),
        (r"^[a-]$", ["a", "-"], ["b"]),
        (r"^\.\*\+\?\(\)\[\]\{\}\|\^\$\/$", [".*+?()[]{}|^$/"], ["x*+?()[]{}|^$/"]),
        (r"^\x41\u00e9[é-ü]$", ["Aéê"], ["AÉê"]),
        ("^(?:a|(?<name>b)|(?P<other>c))$", ["a", "b", "c"], ["d"]),
        ("^a$|^b$", ["a", "b"], ["ab"]),
        ("a|", ["a", ""], ["aa"]),
        ("^()$", [""], ["a"]),
        ("^(|ab)x{0}$", ["", "ab"], ["x", "a"]),
        ("middle", ["middle"], ["in the middle"]),
    ],
)
def test_what_a_pattern_matches(pattern: str, matching: list[str], others: list[str]) -> None:
    matcher = matcher_of(pattern)
    assert [text for text in matching if not matches(matcher, text)] == []
    assert [text for text in others if matches(matcher, text)] == []
    assert all(re.search(pattern.replace("(?<name>", "(?P<name>"), text) for text in matching)


@pytest.mark.parametrize(
    ("pattern", "least", "most"),
    [
        ("^[a-z]{2,5}x?$", 2, 6),
        (r"\d+", 1, None),
        ("a|bcd", 1, 3),
        ("(ab){3}", 6, 6),
        ("", 0, 0),
        ("(a*){2}", 0, None),
    ],
)
def test_the_lengths_of_what_it_matches(pattern: str, least: int, most: int | None) -> None:
    parsed = parse_pattern(pattern)
    assert (parsed.min_length, parsed.max_length) == (least, most)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(?=b)", "lookaround and flags"),
        ("(?i)a", "lookaround and flags"),
        (r"(a)\1", r"escape \\1"),
        (r"\bword", r"escape \\b"),
        (r"\p{L}", r"escape \\p"),
        ("a\\", "escape"),
        (r"\x4", "2 hexadecimal digits"),
        ("[abc", "no ] after it"),
        ("[]", "is empty"),
        ("[z-a]", "ascending order"),
        (r"[\d-z]", "ascending order"),
        ("(a", r"no \) after it"),
        ("a)", r"no \( before it"),
        ("a**", "follow each other"),
        ("a{2}{3}", "follow each other"),
        ("a++", "follow each other"),
        ("*a", "nothing comes before"),
        ("a{x}", "begins no repetition"),
        ("a{3,2}", "larger count first"),
        ("a^b", "at the ends"),
        ("(^a)", "at the ends"),
        ("a$b", "at the ends"),
        ('say "hi"', "quote"),
        (r"a\nb", "control character"),
        (r"\\", "backslash"),
        ("(" * 30 + "a" + ")" * 30, "nested more than"),
        (f"a{{{MAX_REPEAT + 1}}}", "use maxLength"),
        (f"a{{{MAX_REPEAT}}}" * 4, f"larger than {MAX_SIZE:,}"),
        ("((a|ab|abc){0,10}){0,10}", "in another one"),
        ("((a{1,20})*)*", "in another one"),
    ],
)
def test_what_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        parse_pattern(pattern)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_small(name: str) -> None:
    assert format_pattern(name).size < 150
