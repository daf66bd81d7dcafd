"""Text in deltas: whole characters, no stop strings, and every delta reaches its listener."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from memory_limit import limit_pass_tokens
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heft_engine.data.encoding import Example
from heft_engine.data.rows import parse_row
from heft_engine.errors import OutOfMemory, RowError
from heft_engine.inference import decode_batch
from heft_engine.inference.detokenizer import Detokenizer, Vocabulary
from heft_engine.inference.grammar import Constraint, GrammarDeadEnd
from heft_engine.inference.kv_cache import KVCache
from heft_engine.inference.sampling import SamplingParams
from heft_engine.inference.scoring import score
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

    def test_bytes_that_form_no_character_are_flushed_at_the_end(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> None:
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
        ("pieces", "stops", "deltas", "is_hit"),
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
        self, pieces: Sequence[str], stops: Sequence[str], deltas: Sequence[str], is_hit: bool
    ) -> None:
        checker = StopStringFilter(stops)
        assert [checker.push(piece) for piece in pieces] == deltas
        assert checker.is_matched == is_hit
        rest = checker.flush()
        if not is_hit:
            assert "".join(deltas) + rest == "".join(pieces)
        assert checker.push("more") == ("" if is_hit else "more")


class Listener:
    """The deltas and errors that a generator sends, by request."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.pieces: dict[Any, list[TextDelta]] = {}
        self.errors: dict[Any, Exception] = {}

    def listen(self, name: Any, piece: TextDelta | Exception) -> None:
        if isinstance(piece, Exception):
            self.errors[name] = piece
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
def listener(predictor: Predictor) -> Listener:
    return Listener(predictor)


def test_a_text_ends_before_its_stop_string(listener: Listener) -> None:
    listener.submit("whole")
    listener.run()
    whole = listener.text("whole")
    tokens = [token for piece in listener.pieces["whole"] for token in piece.tokens]
    assert [token.text_offset for token in tokens] == sorted(token.text_offset for token in tokens)
    assert listener.pieces["whole"][-1].finish_reason == "length"
    assert len(tokens) == listener.pieces["whole"][-1].completion_tokens == 24

    #: From within one token to within the next but one.
    at = next(token.text_offset for token in tokens if token.text_offset >= len(whole) // 2) - 1
    stop = whole[at : at + 4]
    listener.submit("stopped", stop=("never", stop))
    listener.run()
    assert listener.text("stopped") == whole[: whole.index(stop)]
    last = listener.pieces["stopped"][-1]
    assert last.finish_reason == "stop"
    assert last.completion_tokens < 24
    stopped_tokens = [token for piece in listener.pieces["stopped"] for token in piece.tokens]
    assert stopped_tokens == tokens[: len(stopped_tokens)]
    assert all(token.text_offset < len(listener.text("stopped")) for token in stopped_tokens)
    assert listener.predictor.generator.memory_bytes == 0


def test_the_eos_token_is_not_part_of_the_text(listener: Listener) -> None:
    listener.submit("whole")
    listener.run()
    third = [token.token_bytes for piece in listener.pieces["whole"] for token in piece.tokens][2]
    end = token_of(listener.predictor.encoder.tokenizer, third)
    listener.predictor.lm.model.generation_config.eos_token_id = [2, end]  # type: ignore[union-attr]
    listener.submit("ended")
    listener.run()
    last = listener.pieces["ended"][-1]
    assert last.finish_reason == "stop"
    assert last.completion_tokens <= 2
    assert listener.text("whole").startswith(listener.text("ended"))


def test_a_cancelled_text_leaves_at_once(listener: Listener) -> None:
    listener.submit("gone", max_tokens=200)
    listener.submit("never began", max_tokens=200)
    listener.submit("stays")
    listener.predictor.generator.cancel("never began")
    listener.predictor.generator.step()
    listener.predictor.generator.step()
    memory_bytes = listener.predictor.generator.memory_bytes
    listener.predictor.generator.cancel("gone")
    listener.predictor.generator.step()
    assert 0 < listener.predictor.generator.memory_bytes < memory_bytes
    before = list(listener.pieces["gone"])
    listener.run()
    assert listener.pieces["gone"] == before
    assert "never began" not in listener.pieces
    assert listener.pieces["stays"][-1].finish_reason == "length"


def test_every_listener_receives_the_error_of_a_failed_pass(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError

    listener.submit("one")
    listener.predictor.generator.step()
    listener.submit("two")
    with monkeypatch.context() as patch:
        patch.setattr(listener.predictor.lm, "finish", fail)
        with pytest.raises(ArithmeticError):
            listener.predictor.generator.step()
    assert set(listener.errors) == {"one", "two"}
    assert not listener.predictor.generator.is_busy
    listener.submit("three")
    listener.run()
    assert listener.pieces["three"][-1].finish_reason == "length"


def test_memory_that_stays_out_while_slots_grow_ends_all_and_leaks_nothing(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    for name in ("one", "two", "three"):
        listener.submit(name, max_tokens=200)
    listener.predictor.generator.step()
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_insert", fail)
        listener.run()
    assert set(listener.errors) == {"one", "two", "three"}
    assert all(isinstance(error, OutOfMemory) for error in listener.errors.values())
    assert listener.predictor.generator.memory_bytes == 0
    listener.submit("four")
    listener.run()
    assert listener.pieces["four"][-1].finish_reason == "length"


def test_a_prompt_without_memory_ends_its_own_request(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_pass_tokens(monkeypatch, 100)
    listener.submit("long", prompt="again and again " * 40)
    listener.submit("short")
    listener.run()
    assert isinstance(listener.errors["long"], OutOfMemory)
    assert list(listener.errors) == ["long"]
    assert listener.pieces["short"][-1].finish_reason == "length"


def test_a_request_that_never_has_room_is_refused(tiny_llama_dir: Path) -> None:
    small = load_base(str(tiny_llama_dir), task="text", device="cpu", key_value_bytes=50_000)
    with pytest.raises(RowError, match="fewer max_tokens") as refusal:
        Listener(small).submit("long", max_tokens=300)
    assert refusal.value.param == "max_tokens"
    assert not small.generator.is_busy


class TestConstraints:
    YES_OR_NO = Constraint(kind="ebnf", source='root ::= "yes" | "no"')

    def test_a_text_matches_its_constraint_and_ends_with_it(self, listener: Listener) -> None:
        listener.submit("free")
        listener.run()
        free = listener.pieces.pop("free")
        listener.submit("free")
        listener.submit("constrained", constraint=self.YES_OR_NO)
        listener.run()
        assert listener.text("constrained") in ("yes", "no")
        assert listener.pieces["constrained"][-1].finish_reason == "stop"
        assert listener.pieces["free"] == free

    def test_max_tokens_and_stop_strings_end_it_earlier(self, listener: Listener) -> None:
        digits = Constraint(kind="ebnf", source="root ::= [0-9]{100}")
        listener.submit("short", constraint=digits, max_tokens=5)
        listener.submit("stopped", constraint=Constraint(kind="ebnf", source='root ::= "abc"'), stop=("b",))
        listener.run()
        assert listener.pieces["short"][-1].finish_reason == "length"
        assert listener.text("short").isdigit()
        assert listener.text("stopped") == "a"
        assert listener.pieces["stopped"][-1].finish_reason == "stop"

    def test_a_constraint_that_cannot_be_compiled_queues_nothing(self, listener: Listener) -> None:
        listener.submit("running", max_tokens=12)
        listener.predictor.generator.step()
        with pytest.raises(RowError, match="can't be turned into a grammar"):
            listener.submit("refused", constraint=Constraint(kind="ebnf", source="nonsense"))
        listener.run()
        assert list(listener.pieces) == ["running"]

    def test_a_dead_end_is_told_to_its_listener_alone(
        self, listener: Listener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            decode_batch, "mask_tokens", lambda _, matchers: [row for row, m in enumerate(matchers) if m]
        )
        listener.submit("free")
        listener.submit("constrained", constraint=self.YES_OR_NO)
        listener.run()
        assert isinstance(listener.errors["constrained"], GrammarDeadEnd)
        assert listener.pieces["free"][-1].finish_reason == "length"
        assert listener.predictor.generator.memory_bytes == 0


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


def test_an_echo_has_the_log_probabilities_of_the_prompt(listener: Listener, predictor: Predictor) -> None:
    """Their sum is the score of the same tokens as an answer to the first one. Longer than one chunk of logits."""
    prompt = "Once upon a time, naïve. " * 12
    listener.submit("echo", prompt, echo=prompt, prompt_logprobs=True)
    listener.submit("plain", prompt)
    listener.run()
    tokens = predictor.encoder.raw(prompt).prompt
    assert len(tokens) > 128
    deltas = listener.pieces["echo"]
    told = [token for delta in deltas for token in delta.tokens]
    echoed, written = told[: len(tokens)], told[len(tokens) :]
    (scores,) = score(
        predictor.lm, [Example(prompt=tokens[:1], answers=(tokens[1:],), labels=("",), gold=None)]
    )
    assert echoed[0].logprob is None
    assert sum(token.logprob or 0.0 for token in echoed) == pytest.approx(scores.totals[0], abs=1e-3)
    assert b"".join(token.token_bytes for token in echoed).decode() == prompt
    assert [token.text_offset for token in echoed] == sorted(token.text_offset for token in echoed)
    assert listener.text("echo") == prompt + listener.text("plain")
    plain = [token for delta in listener.pieces["plain"] for token in delta.tokens]
    assert [token.logprob for token in written] == [token.logprob for token in plain]
    assert [t.text_offset - len(prompt) for t in written] == [t.text_offset for t in plain]
    assert deltas[-1].completion_tokens == listener.pieces["plain"][-1].completion_tokens


def test_an_echo_alone_writes_nothing(listener: Listener) -> None:
    listener.submit("echo", "Once", echo="Once", echo_only=True, prompt_logprobs=True, max_tokens=1)
    listener.run()
    (delta,) = listener.pieces["echo"]
    assert (delta.text, delta.finish_reason, delta.completion_tokens) == ("Once", "length", 0)
    assert len(delta.tokens) > 1
