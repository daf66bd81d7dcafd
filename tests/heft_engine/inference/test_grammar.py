"""Texts that match a grammar, in one batch with texts that need none."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Hashable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
import xgrammar
from jsonschema import validate
from memory_limit import limit_pass_tokens
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from heft_engine.errors import EngineError, Overloaded, RowError
from heft_engine.inference import grammar as grammar_module
from heft_engine.inference.compilation import Compilation, CompilationThreads
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.grammar import Constraint, GrammarCompiler, GrammarDeadEnd, mask_tokens
from heft_engine.inference.sampling import SampledToken, SamplingParams
from heft_engine.inference.scheduler import DecodeScheduler
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.packed_lm import PackedLM

VOCABULARY, EOS = 600, 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DRAWN = SamplingParams(temperature=1.0, seed=7, top_logprobs=0)
Tokens = dict[Hashable, list[SampledToken]]


def json_constraint(schema: object) -> Constraint:
    return Constraint(kind="json_schema", source=json.dumps(schema))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama_dir)
    return loaded


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCABULARY, eos_tokens=[EOS])


@pytest.fixture
def llama(tiny_llama_dir: Path) -> PackedLM:
    return PackedLM(load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION))


def request(name: int, **options: object) -> DecodeRequest:
    prompt = tuple(range(5 + name, 25 + name))
    settings = {"max_tokens": 90, "sampling": DRAWN} | options
    return DecodeRequest(id=name, prompt=prompt, **settings)  # type: ignore[arg-type]


def decoded(lm: PackedLM, *requests: DecodeRequest) -> tuple[Tokens, dict[Hashable, EngineError]]:
    """Returns the tokens of each request up to its EOS token, decoded in one batch, and what failed."""
    scheduler = DecodeScheduler(DecodeBatch(lm, budget_bytes=2**30))
    scheduler.add(requests)
    most = {request.id: request.max_tokens for request in requests}
    tokens: Tokens = {request.id: [] for request in requests}
    failed: dict[Hashable, EngineError] = {}
    while scheduler.is_busy:
        for request_id, sampled in scheduler.step().items():
            tokens[request_id].append(sampled)
            if sampled.token == EOS or len(tokens[request_id]) == most[request_id]:
                scheduler.abort(request_id)
        failed |= scheduler.take_failed()
    assert scheduler.batch.allocated_bytes == 0
    return tokens, failed


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[SampledToken]) -> str:
    text: str = tokenizer.decode([sampled.token for sampled in tokens], skip_special_tokens=True)
    return text


@pytest.mark.usefixtures("batch_invariant")
def test_constrained_and_free_texts_share_a_batch(
    tiny_llama_dir: Path, tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler
) -> None:
    """Bit for bit: tokens and log-probabilities of both kinds are those of a batch of their own."""
    lm = PackedLM(load_model(resolve_path(tiny_llama_dir), dtype=torch.float32, attention=IMPLEMENTATION))
    grammar = compiler.compile(json_constraint(SCHEMA))
    requests = [
        request(0),
        request(1, grammar=grammar),
        request(2, sampling=SamplingParams()),
        request(3, grammar=grammar, sampling=SamplingParams(temperature=2.0, top_p=0.9, seed=1)),
        request(4, grammar=grammar, sampling=SamplingParams(temperature=1.5, seed=2, frequency_penalty=1.0)),
    ]
    together, failed = decoded(lm, *requests)
    assert not failed
    for alone in requests:
        assert decoded(lm, alone)[0][alone.id] == together[alone.id]
    for name in (1, 3, 4):
        assert together[name][-1].token == EOS
        validate(json.loads(text_of(tokenizer, together[name])), SCHEMA)


def test_the_likeliest_allowed_token_is_taken(
    llama: PackedLM, tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler
) -> None:
    """Greedily, and against a bias that is as strong as a request may ask for."""
    grammar = compiler.compile(Constraint(kind="ebnf", source='root ::= "yes" | "no"'))
    assert llama.vocab_size == VOCABULARY
    bias = SamplingParams(logit_bias=((9, 100.0),))
    tokens, _ = decoded(llama, request(0, grammar=grammar, sampling=SamplingParams()))
    biased, _ = decoded(llama, request(0, grammar=grammar, sampling=bias))
    assert text_of(tokenizer, tokens[0]) in ("yes", "no")
    assert biased == tokens


def test_log_probabilities_are_those_without_the_grammar(llama: PackedLM, compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Constraint(kind="ebnf", source='root ::= "zq"'))
    likeliest = SamplingParams(top_logprobs=1)
    first = decoded(llama, request(0, grammar=grammar, sampling=likeliest))[0][0][0]
    free = decoded(llama, request(0, sampling=likeliest, max_tokens=1))[0][0][0]
    assert first.top_logprobs == free.top_logprobs
    assert first.logprob is not None
    assert first.logprob < first.top_logprobs[0][1]


def test_log_probabilities_stay_the_models_own_when_tokens_are_chosen_in_parts(
    llama: PackedLM, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after the logits of all texts have been masked."""
    grammar = compiler.compile(Constraint(kind="ebnf", source='root ::= "zq"'))
    drawn = SamplingParams(temperature=1.0, seed=1, top_logprobs=3)
    requests = [request(name, grammar=grammar, sampling=drawn) for name in range(3)]
    expected, _ = decoded(llama, *requests)
    argmax = torch.Tensor.argmax

    def limited(logits: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        if logits.dim() == 2 and len(logits) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return argmax(logits, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "argmax", limited)
    assert decoded(llama, *requests)[0] == expected


def test_a_finished_grammar_allows_the_end_alone(
    tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler
) -> None:
    """Both EOS tokens of a model that has two, and no column beyond the tokenizer's vocabulary."""
    two_ends = GrammarCompiler(tokenizer, vocab_size=VOCABULARY + 40, eos_tokens=[EOS, 4])
    matcher = xgrammar.GrammarMatcher(two_ends.compile(Constraint(kind="ebnf", source="root ::= [a-z]*")))
    logits = torch.zeros(3, VOCABULARY + 40)
    free = logits[1].clone()
    assert mask_tokens(logits, [matcher, None, None]) == []
    allowed = set(logits[0].isfinite().nonzero().flatten().tolist())
    assert {EOS, 4} < allowed
    assert max(allowed) < VOCABULARY
    assert logits[1].equal(free)
    finished = xgrammar.GrammarMatcher(two_ends.compile(Constraint(kind="ebnf", source='root ::= "a"')))
    finished.accept_string("a")
    logits = torch.zeros(1, VOCABULARY + 40)
    mask_tokens(logits, [finished])
    assert logits[0].isfinite().nonzero().flatten().tolist() == [EOS, 4]


def test_neither_special_tokens_nor_control_characters_are_text(
    tokenizer: PreTrainedTokenizerBase, compiler: GrammarCompiler
) -> None:
    matcher = xgrammar.GrammarMatcher(compiler.compile(json_constraint({"type": "string", "maxLength": 20})))
    matcher.accept_string('"')
    logits = torch.zeros(1, VOCABULARY)
    mask_tokens(logits, [matcher])
    allowed = logits[0].isfinite().nonzero().flatten().tolist()
    assert not set(allowed) & set(tokenizer.all_special_ids)
    assert len(allowed) > 300
    assert not any(character < " " for character in tokenizer.decode(allowed))
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    content = {"type": "token", "token": "<|im_start|>"}
    tag = Constraint(kind="structural_tag", source=json.dumps({"type": "structural_tag", "format": content}))
    logits = torch.zeros(1, VOCABULARY)
    mask_tokens(logits, [xgrammar.GrammarMatcher(compiler.compile(tag))])
    assert logits[0].isfinite().nonzero().flatten().tolist() == [start]
    unknown = Constraint(
        kind="structural_tag", source=tag.source.replace("im_start", "im_stop"), param="tools"
    )
    with pytest.raises(RowError, match=r"no token <\|im_stop\|>"):
        compiler.compile(unknown)


def test_a_preempted_text_goes_on_in_its_grammar(
    llama: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    compiler: GrammarCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar = compiler.compile(json_constraint(SCHEMA))
    drawn = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4)]
    requests = [request(seed, grammar=grammar, sampling=params) for seed, params in enumerate(drawn)]
    expected, _ = decoded(llama, *requests)
    decode, calls = DecodeBatch._decode, []

    def without_memory(batch: DecodeBatch) -> object:
        calls.append(len(batch))
        if len(calls) % 5 == 0 and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(batch)

    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(DecodeBatch, "_decode", without_memory)
    tokens, failed = decoded(llama, *requests)
    assert not failed
    assert len(calls) > 5
    for name in range(4):
        validate(json.loads(text_of(tokenizer, tokens[name])), SCHEMA)
    assert [text_of(tokenizer, tokens[name]) for name in range(4)] == [
        text_of(tokenizer, expected[name]) for name in range(4)
    ]


def test_a_prefill_that_is_run_again_begins_at_the_grammars_start(
    llama: PackedLM,
    tokenizer: PreTrainedTokenizerBase,
    compiler: GrammarCompiler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar = compiler.compile(json_constraint(SCHEMA))
    requests = [request(name, grammar=grammar) for name in range(4)]
    limit_pass_tokens(monkeypatch, 50)
    tokens, failed = decoded(llama, *requests)
    assert not failed
    for name in range(4):
        validate(json.loads(text_of(tokenizer, tokens[name])), SCHEMA)


def test_a_dead_end_ends_its_own_text(llama: PackedLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """A vocabulary without the letter that the grammar asks for next."""
    spellings = [tokenizer.convert_ids_to_tokens(token) for token in range(VOCABULARY)]
    without_q = ["" if "q" in str(spelling) else spelling for spelling in spellings]
    vocabulary = xgrammar.TokenizerInfo(
        without_q, xgrammar.VocabType.BYTE_LEVEL, vocab_size=VOCABULARY, stop_token_ids=[EOS]
    )
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_grammar('root ::= "aq"')
    at_once = xgrammar.GrammarCompiler(vocabulary).compile_grammar('root ::= "q"')
    free = request(0, max_tokens=6)
    tokens, failed = decoded(llama, free, request(1, grammar=grammar), request(2, grammar=at_once))
    assert set(failed) == {1, 2}
    assert all(isinstance(error, GrammarDeadEnd) for error in failed.values())
    assert text_of(tokenizer, tokens[1]) == "a"
    assert len(tokens[0]) == 6


def test_a_removed_text_releases_its_matcher(llama: PackedLM, compiler: GrammarCompiler) -> None:
    batch = DecodeBatch(llama, budget_bytes=2**30)
    batch.prefill([request(0, grammar=compiler.compile(json_constraint(SCHEMA)))])
    matcher = weakref.ref(batch._sequences[0].matcher)  # type: ignore[arg-type]
    batch.preempt(1)
    gc.collect()
    assert matcher() is not None, "a preempted text goes on"
    batch.remove(0)
    gc.collect()
    assert matcher() is None


@pytest.fixture
def busy_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keeps all threads that compile grammars busy until the event is set."""
    threads, may_end = CompilationThreads(2), threading.Event()
    monkeypatch.setattr(grammar_module, "_compilation_threads", lambda: threads)
    for _ in range(2):
        threads.submit(Compilation(lambda: may_end.wait(60)))
    yield may_end
    may_end.set()


class TestCompiling:
    @pytest.mark.parametrize(
        ("constraint", "reason"),
        [
            (json_constraint({"type": "strin"}), "Unsupported type"),
            (Constraint(kind="ebnf", source="root := nothing"), "can't be turned into a grammar"),
            (Constraint(kind="structural_tag", source="{}", param="tools"), "tools can't be turned"),
        ],
    )
    def test_what_xgrammar_refuses_names_the_field(
        self, compiler: GrammarCompiler, constraint: Constraint, reason: str
    ) -> None:
        with pytest.raises(RowError, match=reason) as refusal:
            compiler.compile(constraint)
        assert refusal.value.param == constraint.param

    def test_a_tokenizer_without_an_end_is_refused(self, tokenizer: PreTrainedTokenizerBase) -> None:
        endless = GrammarCompiler(tokenizer, vocab_size=VOCABULARY, eos_tokens=[VOCABULARY])
        with pytest.raises(RowError, match="no end-of-text token"):
            endless.compile(json_constraint(SCHEMA))

    def test_a_slow_compilation_fails_alone(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurried = GrammarCompiler(tokenizer, vocab_size=VOCABULARY, eos_tokens=[EOS], seconds=0.05)
        hurried._xgrammar_compiler()
        compile_one, may_end = hurried._compile, threading.Event()

        def slow(constraint: Constraint) -> xgrammar.CompiledGrammar:
            if "slow" in constraint.source:
                may_end.wait(20)
            return compile_one(constraint)

        monkeypatch.setattr(hurried, "_compile", slow)
        with pytest.raises(RowError, match=r"within 0\.05 s"):
            hurried.compile(json_constraint({"const": "slow"}))
        hurried._seconds = 20
        hurried.compile(json_constraint({"const": "quick"}))
        may_end.set()

    @pytest.mark.usefixtures("busy_threads")
    def test_a_grammar_that_is_kept_is_there_at_once(
        self, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also while all threads are busy, and without a compilation: the one that was compiled is returned."""
        monkeypatch.setattr(compiler, "_queue_seconds", 0)
        kept = compiler._compile(json_constraint({"const": "kept"}))
        compiler._cache.add(json_constraint({"const": "kept"}), kept)
        assert compiler.compile(json_constraint({"const": "kept"})) is kept

    @pytest.mark.usefixtures("busy_threads")
    def test_time_in_the_queue_is_nobodys_fault(
        self, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compiler, "_queue_seconds", 0.01)
        monkeypatch.setattr(compiler, "_seconds", 0)
        with pytest.raises(Overloaded, match="ask again later"):
            compiler.compile(json_constraint({"const": "queued"}))

    def test_a_compilation_without_a_request_is_dropped(
        self, compiler: GrammarCompiler, busy_threads: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compiler, "_queue_seconds", 0)
        abandoned = json_constraint({"const": "abandoned"})
        with pytest.raises(Overloaded):
            compiler.compile(abandoned)
        dropped = compiler._compilations[abandoned]
        busy_threads.set()
        with pytest.raises(CancelledError):
            dropped.future.result(20)
        compiler._queue_seconds = 20
        assert compiler.compile(abandoned)

    def test_requests_for_one_grammar_share_its_compilation(
        self, compiler: GrammarCompiler, busy_threads: threading.Event
    ) -> None:
        shared = json_constraint({"const": "shared"})
        with compiler._lock:
            first, second = (compiler._joined(shared) for _ in range(2))
        assert first is second
        busy_threads.set()
        assert first.result(queue_seconds=20, seconds=20) is compiler.compile(shared)

    def test_a_process_ends_during_a_compilation(self) -> None:
        program = (
            "import threading\n"
            "from heft_engine.inference.compilation import Compilation, CompilationThreads\n"
            "begun = threading.Event()\n"
            "compilation = Compilation(lambda: (begun.set(), threading.Event().wait()))\n"
            "CompilationThreads(1).submit(compilation)\n"
            "assert begun.wait(20)\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    def test_grammars_are_kept_within_their_budget(self, tokenizer: PreTrainedTokenizerBase) -> None:
        small = GrammarCompiler(tokenizer, vocab_size=VOCABULARY, eos_tokens=[EOS], cache_bytes=200_000)
        for number in range(20):
            small.compile(json_constraint(SCHEMA | {"maxProperties": 3 + number}))
        assert 0 < small._cache.bytes <= 200_000
        assert 1 < len(small._cache._grammars) < 20

    def test_a_structural_tag_holds_its_schema(self, compiler: GrammarCompiler) -> None:
        tag = {
            "type": "structural_tag",
            "format": {
                "type": "tag",
                "begin": "<call>",
                "content": {"type": "json_schema", "json_schema": SCHEMA, "max_whitespace_cnt": 1},
                "end": "</call>",
            },
        }
        grammar = compiler.compile(Constraint(kind="structural_tag", source=json.dumps(tag)))
        matcher = xgrammar.GrammarMatcher(grammar)
        assert matcher.accept_string('<call>{"name": "ann", "age": 3, "tags": []}</call>')
        assert matcher.is_completed()


def test_a_gpu_gets_the_same_mask(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = grammar_module._mask_backend("cuda")
    assert backend != grammar_module._mask_backend("cpu")
    matcher = xgrammar.GrammarMatcher(compiler.compile(json_constraint(SCHEMA)))
    matcher.accept_string('{"name": "')
    expected = torch.randn(3, VOCABULARY)
    logits = expected.clone()
    mask_tokens(expected, [None, matcher, None])
    monkeypatch.setattr(grammar_module, "_mask_backend", lambda device_type: backend)
    mask_tokens(logits, [None, matcher, None])
    assert logits.equal(expected)
    assert 20 < logits[1].isfinite().sum() < VOCABULARY
