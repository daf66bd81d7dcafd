"""Text piece by piece: whole characters, no stop strings, and listeners that hear all of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heft_engine.data.rows import parse_row
from heft_engine.errors import RowError
from heft_engine.inference.detokenizer import Detokenizer, Vocabulary
from heft_engine.inference.kv_cache import KVCache
from heft_engine.inference.sampling import SamplingParams
from heft_engine.inference.stop_strings import StopStringFilter
from heft_engine.serving.predictor import Predictor, load_base
from heft_engine.serving.text_generator import TextDelta, TextRequest

SCRIPTS = "Plain, naïve, “quoted” — Ελληνικά, 日本語, עברית, 👩‍👩‍👧 and 𝔘𝔫𝔦. </s>"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return loaded


def token_of(tokenizer: PreTrainedTokenizerBase, spelling: bytes) -> int:
    vocabulary = Vocabulary(tokenizer)
    return next(token for token in range(600) if vocabulary.bytes_of(token) == spelling)


@pytest.fixture
def predictor(tiny_llama_dir: Path) -> Predictor:
    return load_base(str(tiny_llama_dir), task="text", device="cpu")


class TestDetokenizer:
    def test_never_half_a_character(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Most of these characters are two to four tokens each."""
        tokens = tokenizer(SCRIPTS, add_special_tokens=False)["input_ids"]
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token) for token in tokens]
        assert "\ufffd" not in "".join(pieces)
        assert sum(not piece for piece in pieces) > 20
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) + detokenizer.flush() == whole == SCRIPTS.removesuffix("</s>")

    def test_what_can_be_no_character_is_told_in_the_end(self, tokenizer: PreTrainedTokenizerBase) -> None:
        broken = token_of(tokenizer, b"\x97")
        detokenizer = Detokenizer(tokenizer)
        assert [detokenizer.push(broken) for _ in range(3)] == ["", "", ""]
        assert detokenizer.flush() == "\ufffd" * 3
        many = Detokenizer(tokenizer)
        assert len("".join(many.push(broken) for _ in range(40))) > 20

    def test_tokens_have_the_bytes_they_stand_for(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = tokenizer(SCRIPTS, add_special_tokens=False)["input_ids"]
        vocabulary = Vocabulary(tokenizer)
        assert b"".join(map(vocabulary.bytes_of, tokens)).decode() == SCRIPTS


class TestStopStrings:
    @pytest.mark.parametrize(
        ("pieces", "stops", "told", "is_hit"),
        [
            (["Hello", " wor", "ld"], [], ["Hello", " wor", "ld"], False),
            (["one\n", "\ntwo"], ["\n\n"], ["one", ""], True),
            (["a END b"], ["END"], ["a "], True),
            (["a E", "N", "D b"], ["END"], ["a ", "", ""], True),
            (["a E", "N", "d b"], ["END"], ["a ", "", "ENd b"], False),
            (["aab", "aac"], ["aabaac"], ["", ""], True),
            (["aaba", "abaac"], ["aabaac"], ["", "aab"], True),
            (["x y"], ["y", "x"], [""], True),
            (["ends with EN"], ["END"], ["ends with "], False),
        ],
    )
    def test_stop_strings_over_pieces(
        self, pieces: Sequence[str], stops: Sequence[str], told: Sequence[str], is_hit: bool
    ) -> None:
        checker = StopStringFilter(stops)
        assert [checker.push(piece) for piece in pieces] == told
        assert checker.is_matched == is_hit
        rest = checker.flush()
        if not is_hit:
            assert "".join(told) + rest == "".join(pieces)
        assert checker.push("more") == ("" if is_hit else "more")


class Heard:
    """All that a writer tells, by request."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.pieces: dict[Any, list[TextDelta]] = {}
        self.faults: dict[Any, Exception] = {}

    def listen(self, name: Any, piece: TextDelta | Exception) -> None:
        if isinstance(piece, Exception):
            self.faults[name] = piece
        else:
            self.pieces.setdefault(name, []).append(piece)

    def submit(self, name: Any, prompt: str = "Once upon a time", **settings: Any) -> None:
        tokens = self.predictor.encoder.raw(prompt).prompt
        request = TextRequest(id=name, prompt=tokens, **{"max_tokens": 24, "sampling": DRAWN} | settings)
        self.predictor.generator.submit([request], self.listen)

    def text(self, name: Any) -> str:
        return "".join(piece.text for piece in self.pieces[name])

    def run(self) -> None:
        while self.predictor.generator.is_busy:
            self.predictor.generator.step()


#: Drawn, because the tiny model's likeliest word is always the same one.
DRAWN = SamplingParams(temperature=1.0, seed=11, top_logprobs=1)


@pytest.fixture
def heard(predictor: Predictor) -> Heard:
    return Heard(predictor)


def test_a_text_ends_before_its_stop_string(heard: Heard) -> None:
    heard.submit("whole")
    heard.run()
    whole = heard.text("whole")
    tokens = [token for piece in heard.pieces["whole"] for token in piece.tokens]
    assert [token.text_offset for token in tokens] == sorted(token.text_offset for token in tokens)
    assert heard.pieces["whole"][-1].finish_reason == "length"
    assert len(tokens) == heard.pieces["whole"][-1].completion_tokens == 24

    #: From within one token to within the next but one.
    at = next(token.text_offset for token in tokens if token.text_offset >= len(whole) // 2) - 1
    stop = whole[at : at + 4]
    heard.submit("stopped", stop=("never", stop))
    heard.run()
    assert heard.text("stopped") == whole[: whole.index(stop)]
    last = heard.pieces["stopped"][-1]
    assert last.finish_reason == "stop"
    assert last.completion_tokens < 24
    told = [token for piece in heard.pieces["stopped"] for token in piece.tokens]
    assert told == tokens[: len(told)]
    assert all(token.text_offset < len(heard.text("stopped")) for token in told)
    assert heard.predictor.generator.memory_bytes == 0


def test_the_models_own_end_is_not_told(heard: Heard) -> None:
    heard.submit("whole")
    heard.run()
    third = [token.token_bytes for piece in heard.pieces["whole"] for token in piece.tokens][2]
    end = token_of(heard.predictor.encoder.tokenizer, third)
    heard.predictor.lm.model.generation_config.eos_token_id = [2, end]  # type: ignore[union-attr]
    heard.submit("ended")
    heard.run()
    last = heard.pieces["ended"][-1]
    assert last.finish_reason == "stop"
    assert last.completion_tokens <= 2
    assert heard.text("whole").startswith(heard.text("ended"))


def test_a_cancelled_text_leaves_at_once(heard: Heard) -> None:
    heard.submit("gone", max_tokens=200)
    heard.submit("never began", max_tokens=200)
    heard.submit("stays")
    heard.predictor.generator.cancel("never began")
    heard.predictor.generator.step()
    heard.predictor.generator.step()
    held = heard.predictor.generator.memory_bytes
    heard.predictor.generator.cancel("gone")
    heard.predictor.generator.step()
    assert 0 < heard.predictor.generator.memory_bytes < held
    before = list(heard.pieces["gone"])
    heard.run()
    assert heard.pieces["gone"] == before
    assert "never began" not in heard.pieces
    assert heard.pieces["stays"][-1].finish_reason == "length"


def test_everybody_hears_of_a_pass_that_fails(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    heard.submit("one")
    heard.predictor.generator.step()
    heard.submit("two")
    with monkeypatch.context() as patch:
        patch.setattr(heard.predictor.lm, "finish", fail)
        with pytest.raises(MemoryError):
            heard.predictor.generator.step()
    assert set(heard.faults) == {"one", "two"}
    assert not heard.predictor.generator.is_busy
    heard.submit("three")
    heard.run()
    assert heard.pieces["three"][-1].finish_reason == "length"


def test_memory_that_is_out_while_slots_grow_ends_all_and_leaks_nothing(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    for name in ("one", "two", "three"):
        heard.submit(name, max_tokens=200)
    heard.predictor.generator.step()
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_insert", fail)
        with pytest.raises(MemoryError):
            heard.run()
    assert set(heard.faults) == {"one", "two", "three"}
    assert heard.predictor.generator.memory_bytes == 0
    heard.submit("four")
    heard.run()
    assert heard.pieces["four"][-1].finish_reason == "length"


def test_what_never_has_room_is_refused(tiny_llama_dir: Path) -> None:
    small = load_base(str(tiny_llama_dir), task="text", device="cpu", key_value_bytes=50_000)
    with pytest.raises(RowError, match="fewer max_tokens") as refusal:
        Heard(small).submit("long", max_tokens=300)
    assert refusal.value.param == "max_tokens"
    assert not small.generator.is_busy


class TestPredict:
    @pytest.fixture
    def rows(self, predictor: Predictor) -> list[Any]:
        predictor.max_new_tokens = 12
        return [parse_row({"prompt": f"Tell {n} tales" * n}, need_answer=False) for n in range(1, 7)]

    def test_rows_of_a_call_are_written_together(self, predictor: Predictor, rows: list[Any]) -> None:
        passes: list[None] = []
        predictor.lm.on_forward = lambda: passes.append(None)
        together = predictor.predict(rows)
        assert len(passes) == predictor.max_new_tokens
        assert together == [predictor.predict([row])[0] for row in rows]
        assert all(answer.answer and answer.completion_tokens == 12 for answer in together)

    def test_several_threads_share_passes(self, predictor: Predictor, rows: list[Any]) -> None:
        expected = predictor.predict(rows)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda row: predictor.predict([row])[0], rows)) == expected
        assert predictor.generator.memory_bytes == 0
