"""Whatever a grammar of a supported schema writes validates against the schema, as jsonschema judges."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import xgrammar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heft_engine.inference.grammar import Constraint, GrammarCompiler
from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.json_schema.schema_error import SchemaError
from heft_engine.json_schema.string_formats import FORMATS

VOCABULARY, EOS = 600, 2
SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
MOST_TOKENS = 400

PATTERNS = st.sampled_from(
    [
        "^[a-z]{1,6}$",
        r"^\+?\d{1,3}-\d{4}$",
        r"[A-Z]\w{0,4}",
        r"^(foo|ba[rz]|q\.u)?$",
        r"^[^a-y]{2}$",
        r"^.{0,3}$",
        r"^\S\W\D$",
        r"[\w.+-]{1,5}@[a-z]{2}",
        r"^é[à-ü]{1,2}日?$",
        r"^a$|^b{2,3}$",
        r"^(?:ab?|(?P<x>c)d*){1,2}$",
        r"^[/\-\]\^$*]{1,3}$",
        r"^\x41B\$\{\}$",
    ]
)
NAMES = st.sampled_from(["a", "b", "title", "name", "default", "é", 'qu"ote', "back\\slash", "type", ""])
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, -7, 2.5, 1e21, "", "text", 'a/b\n"é\t\\', [1, "x"], {"k": [None]}, 0.1, 10**15]
)


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["integer", "number"]))
    bound = (
        st.integers(-1_000, 1_000)
        if kind == "integer" or draw(st.booleans())
        else st.decimals(-50, 50, places=3).map(float)
    )
    names = draw(st.sets(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])))
    schema: dict[str, Any] = {"type": kind, **{name: draw(bound) for name in names}}
    if kind == "integer" and draw(st.booleans()):
        schema["multipleOf"] = draw(st.integers(1, 30))
    return schema


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    keyword = draw(st.sampled_from(["length", "pattern", "format", None]))
    schema: dict[str, Any] = {"type": "string", "description": "a string"}
    if keyword == "pattern":
        schema["pattern"] = draw(PATTERNS)
    if keyword == "format":
        schema["format"] = draw(st.sampled_from(FORMATS))
    if keyword == "length":
        least = draw(st.integers(0, 4))
        schema |= {"minLength": least, "maxLength": least + draw(st.integers(0, 6))}
    return schema


def arrays(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.integers(0, 3)
    return st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": parts,
            "prefixItems": st.lists(parts, min_size=1, max_size=2),
            "minItems": bounds,
            "maxItems": bounds,
        },
    )


@st.composite
def objects(draw: st.DrawFn, parts: st.SearchStrategy[Any]) -> dict[str, Any]:
    if draw(st.integers(0, 5)) == 0:
        return {
            "type": "object",
            "additionalProperties": draw(parts),
            "maxProperties": draw(st.integers(0, 2)),
        }
    properties = draw(st.dictionaries(NAMES, parts, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = [name for name in properties if draw(st.booleans())]
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.booleans())
    for name in ("minProperties", "maxProperties"):
        if draw(st.integers(0, 3)) == 0:
            schema[name] = draw(st.integers(0, 4))
    return schema


def combined(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3)),
        st.builds(lambda options: {"oneOf": options}, st.lists(parts, min_size=1, max_size=3)),
        st.builds(lambda part: {"allOf": [part]}, parts),
        st.just({"$ref": "#/$defs/Node"}),
        st.just({"$ref": "#/$defs/Leaf", "description": "a leaf"}),
    )


LEAVES = st.one_of(
    numbers(),
    strings(),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, VALUES),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["string", "null"], "maxLength": 3},
            {"type": "string"},
        ]
    ),
)
PARTS = st.recursive(
    LEAVES, lambda parts: st.one_of(arrays(parts), objects(parts), combined(parts)), max_leaves=8
)
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"$ref": "#/$defs/Node"},
    },
    "required": ["value"],
}


class Writer:
    """Writes random texts of schemas, token for token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._compiler = GrammarCompiler(tokenizer, vocab_size=VOCABULARY, eos_tokens=[EOS])
        self._spellings: list[bytes] = self._compiler._vocabulary().decoded_vocab

    def write(self, schema: Any, seed: int) -> str | None:
        """Returns a random text; None if it has not ended within MOST_TOKENS tokens.

        Tokens that close something are taken more often, so that texts end. Bytes of surrogates, which no text has and
        xgrammar takes for characters, are not written.
        """
        source = json.dumps(grammar_schema(schema))
        grammar = self._compiler.compile(Constraint(kind="json_schema", source=source))
        matcher, rng, text = xgrammar.GrammarMatcher(grammar), random.Random(seed), b""
        bitmask = xgrammar.allocate_token_bitmask(1, VOCABULARY)
        for _ in range(MOST_TOKENS):
            matcher.fill_next_token_bitmask(bitmask)
            words = bitmask[0].tolist()
            allowed = [
                token
                for token, spelling in enumerate(self._spellings)
                if words[token // 32] >> (token % 32) & 1 and not SURROGATE.search(text[-2:] + spelling)
            ]
            assert allowed, f"no token can follow {text!r}"
            closing = [t for t in allowed if t == EOS or re.fullmatch(rb'.*["}\]]', self._spellings[t])]
            token = rng.choice(closing if closing and rng.random() < 0.5 else allowed)
            assert matcher.accept_token(token)
            if token == EOS:
                return text.decode()
            text += self._spellings[token]
        return None


@pytest.fixture(scope="module")
def writer(tiny_llama_dir: Path) -> Writer:
    return Writer(AutoTokenizer.from_pretrained(tiny_llama_dir))


def test_texts_of_random_schemas_validate(writer: Writer) -> None:
    written = []

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(part=PARTS, leaf=LEAVES, seed=st.integers(0, 2**32))
    def validate(part: Any, leaf: Any, seed: int) -> None:
        schema = {"type": "object", "properties": {"part": part, "leaf": leaf}, "required": ["part"]}
        schema["$defs"] = {"Node": NODE, "Leaf": leaf}
        Draft202012Validator.check_schema(schema)
        try:
            texts = [writer.write(schema, seed + offset) for offset in range(3)]
        except SchemaError:
            return
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for text in texts:
            if text is not None:
                validator.validate(json.loads(text))
                written.append(text)

    validate()

    assert len(written) >= 100, "too few texts to show anything"


def test_any_json_object_is_json(writer: Writer) -> None:
    texts = [writer.write({"type": "object"}, seed) for seed in range(30)]
    objects = [json.loads(text) for text in texts if text is not None]
    assert len(objects) > 15
    assert all(isinstance(value, dict) for value in objects)
    assert len({text for text in texts if text is not None}) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_a_format_have_it(writer: Writer, name: str) -> None:
    schema = {"type": "string", "format": name}
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for seed in range(20):
        text = writer.write(schema, seed)
        assert text is not None
        validator.validate(json.loads(text))
