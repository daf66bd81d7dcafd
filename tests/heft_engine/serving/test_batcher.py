"""Requests that wait together share a pass, which changes no answer; a large request delays no small one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from many_models import examples, merged, models, unmerged
from memory_limit import limit_pass_tokens
from probe_models import packed

from heft_engine.data.encoding import Example
from heft_engine.errors import OutOfMemory
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.scoring import Scores, score
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving import batcher as batching
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.row_adapters import enable_row_adapters

PASSAGE = tuple(range(100, 170))


class PassRecorder:
    """Records the passes of a batcher.

    A batcher answers before it calls its observer: reading waits for the calls that are still to come.
    """

    def __init__(self) -> None:
        self.batcher: Batcher | None = None
        self._passes: list[tuple[int, int, int]] = []
        self._waits: list[float] = []

    def on_pass(
        self, *, rows: int, tokens: int, cached_tokens: int, seconds: float, waits: Sequence[float]
    ) -> None:
        assert seconds > 0
        self._passes.append((rows, tokens, cached_tokens))
        self._waits += waits

    @property
    def passes(self) -> list[tuple[int, int, int]]:
        """Rows, tokens and cached tokens of each pass."""
        self._settle()
        return self._passes

    @property
    def waits(self) -> list[float]:
        self._settle()
        return self._waits

    def _settle(self) -> None:
        if self.batcher is not None:
            self.batcher.run(lambda: None)


@pytest.fixture(scope="module")
def lm(tiny_llama_dir: Path) -> PackedLM:
    return packed(tiny_llama_dir)


@pytest.fixture
def observer() -> PassRecorder:
    return PassRecorder()


@pytest.fixture
def batcher(observer: PassRecorder) -> Iterator[Batcher]:
    batcher = observer.batcher = Batcher(prefix_bytes=2**24, token_budget=300, observer=observer)
    yield batcher
    batcher.close()


@dataclass
class Gate:
    """Blocks the thread that runs passes until it is opened, so that requests gather."""

    batcher: Batcher
    opened: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Gate:
        entered = threading.Event()

        def wait() -> None:
            entered.set()
            assert self.opened.wait(60)

        self.thread = threading.Thread(target=lambda: self.batcher.run(wait))
        self.thread.start()
        assert entered.wait(60)
        return self

    def __exit__(self, *_: Any) -> None:
        self.opened.set()
        self.thread.join()


def results(futures: Sequence[Future[list[Scores]]]) -> list[list[Scores]]:
    return [future.result(60) for future in futures]


def test_requests_that_wait_together_share_passes_and_keep_their_bits(
    lm: PackedLM, batcher: Batcher, observer: PassRecorder
) -> None:
    requests = [examples(3, seed=seed) for seed in range(12)]
    with Gate(batcher):
        futures = [batcher.submit(ModelVariant(lm=lm), request) for request in requests]
    assert results(futures) == [score(lm, request) for request in requests]
    assert sum(rows for rows, _, _ in observer.passes) == 36
    assert max(rows for rows, _, _ in observer.passes) > 3
    assert all(tokens <= 300 for _, tokens, _ in observer.passes)
    assert len(observer.waits) == 36


def test_requests_from_many_threads_get_their_own_scores(lm: PackedLM, batcher: Batcher) -> None:
    requests = [examples(2, seed=seed) for seed in range(40)]

    def ask(request: list[Example]) -> list[Scores]:
        return batcher.submit(ModelVariant(lm=lm), request).result(60)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, requests)) == [score(lm, request) for request in requests]


def test_a_single_request_does_not_wait_for_others(
    lm: PackedLM, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(batcher):
        many = [batcher.submit(ModelVariant(lm=lm), examples(5, seed=1, longest=20)) for _ in range(4)]
    results(many)
    lingered = batcher._last_pass_ended_at + batching.LINGER_SECONDS
    while batching.time.monotonic() < lingered:
        pass
    monkeypatch.setattr(
        batcher._changed, "wait", lambda timeout=None: pytest.fail("it waits") if timeout else wait()
    )
    wait = threading.Condition.wait.__get__(batcher._changed)
    assert batcher.submit(ModelVariant(lm=lm), examples(1)).result(60) == score(lm, examples(1))


def test_after_a_shared_pass_the_batcher_waits_for_the_next_requests(
    lm: PackedLM, batcher: Batcher, observer: PassRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "LINGER_SECONDS", 30.0)
    request = examples(1, longest=10)
    with Gate(batcher):
        futures = [batcher.submit(ModelVariant(lm=lm), request) for _ in range(6)]
    results(futures)
    again = [batcher.submit(ModelVariant(lm=lm), request) for _ in range(6)]  # the sixth ends the waiting
    results(again)
    assert [rows for rows, _, _ in observer.passes] == [6, 6]


def test_questions_on_one_passage_compute_it_once(
    lm: PackedLM, batcher: Batcher, observer: PassRecorder
) -> None:
    weights = ModelVariant(lm=lm, scope="model")
    questions = examples(8, prefix=PASSAGE, longest=20)
    with Gate(batcher):
        together = batcher.submit(weights, questions)
    for scores, expected in zip(together.result(60), score(lm, questions), strict=True):
        assert scores.totals == pytest.approx(expected.totals, abs=2e-4)
    assert sum(cached_tokens for _, _, cached_tokens in observer.passes) == 7 * 64
    assert observer.passes[0][0] == 1, "the others wait for the one that computes the passage"
    batcher.submit(weights, questions[:1], owner="another").result(60)
    assert observer.passes[-1][2] == 0, "another owner's prompt was found"
    batcher.clear_prefixes("model")
    batcher.run(lambda: None)
    assert batcher.prefix_bytes == 0


@pytest.mark.parametrize("of", ["the same model", "another model"])
def test_a_large_request_does_not_delay_a_small_one(
    lm: PackedLM, tiny_llama_dir: Path, batcher: Batcher, of: str
) -> None:
    other = lm if of == "the same model" else packed(tiny_llama_dir)
    ended: list[str] = []
    with Gate(batcher):
        large = batcher.submit(ModelVariant(lm=lm), examples(60, seed=1))
        small = batcher.submit(ModelVariant(lm=other), examples(1, seed=2))
        large.add_done_callback(lambda _: ended.append("large"))
        small.add_done_callback(lambda _: ended.append("small"))
    assert large.result(60) == score(lm, examples(60, seed=1))
    assert small.result(60) == score(other, examples(1, seed=2))
    assert ended == ["small", "large"]


def test_models_on_one_base_share_passes_and_a_merged_model_has_its_own(
    tiny_llama_dir: Path, observer: PassRecorder
) -> None:
    base = packed(tiny_llama_dir)
    enable_row_adapters(base)
    stored = models(base, suffixes=("q_proj", "v_proj"))[:4]
    batcher = Batcher(prefix_bytes=0, observer=observer)
    requests = [examples(2, seed=seed) for seed in range(4)]
    alone = merged(base, stored[0])
    with Gate(batcher):
        shared = [
            batcher.submit(unmerged(base, weights), rows)
            for weights, rows in zip(stored, requests, strict=True)
        ]
        alone_future = batcher.submit(alone, requests[0])
    scores = results([*shared, alone_future])
    batcher.close()
    assert [rows for rows, _, _ in observer.passes] == [8, 2]
    assert scores[-1] == score(alone.lm, requests[0])
    for shared_scores, merged_scores in zip(scores[0], scores[-1], strict=True):
        assert shared_scores.totals == pytest.approx(merged_scores.totals, abs=2e-4)


def test_cancelled_requests_are_skipped(lm: PackedLM, batcher: Batcher, observer: PassRecorder) -> None:
    with Gate(batcher):
        gone = batcher.submit(ModelVariant(lm=lm), examples(3))
        stays = batcher.submit(ModelVariant(lm=lm), examples(1, seed=5))
        assert gone.cancel()
    assert stays.result(60) == score(lm, examples(1, seed=5))
    assert sum(rows for rows, _, _ in observer.passes) == 1


def test_the_answer_to_a_cancelled_request_is_dropped(
    lm: PackedLM, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, cancelled = threading.Event(), threading.Event()
    plain = batching.score_or_fail_rows

    def slow(*arguments: Any) -> list[Scores]:
        begun.set()
        assert cancelled.wait(60)
        return plain(*arguments)

    monkeypatch.setattr(batching, "score_or_fail_rows", slow)
    gone = batcher.submit(ModelVariant(lm=lm), examples(1))
    assert begun.wait(60)
    assert gone.cancel()
    cancelled.set()
    assert batcher.submit(ModelVariant(lm=lm), examples(2)).result(60) == score(lm, examples(2))


def test_an_error_outside_a_pass_is_reported_and_the_thread_continues(
    lm: PackedLM, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(batcher._queue, "take", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            batcher.submit(ModelVariant(lm=lm), examples(2)).result(60)
    assert "scheduling a scoring pass failed" in caplog.text
    assert batcher.submit(ModelVariant(lm=lm), examples(2)).result(60) == score(lm, examples(2))


def test_rows_that_wait_for_a_prefix_that_finds_no_room_run_together(
    lm: PackedLM, observer: PassRecorder
) -> None:
    tiny = Batcher(prefix_bytes=100, token_budget=2_000, observer=observer)
    questions = examples(8, prefix=PASSAGE, longest=20)
    with Gate(tiny):
        together = tiny.submit(ModelVariant(lm=lm, scope="model"), questions)
    assert together.result(60) == score(lm, questions)
    tiny.close()
    assert [rows for rows, _, _ in observer.passes] == [1, 7]


def test_a_failed_pass_fails_its_requests_and_the_next_pass_runs(
    lm: PackedLM, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> list[Scores]:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(batching, "score_or_fail_rows", broken)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            batcher.submit(ModelVariant(lm=lm), examples(2)).result(60)
    assert batcher.submit(ModelVariant(lm=lm), examples(2)).result(60) == score(lm, examples(2))
    with pytest.raises(ZeroDivisionError):
        batcher.run(lambda: 1 // 0)


def test_a_row_without_memory_ends_its_own_request(
    lm: PackedLM, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, small = ModelVariant(lm=lm), examples(6, longest=20)
    large = Example(prompt=(5,) * 150, answers=((7,), (9,)), labels=("a", "b"), gold=None)
    expected = score(lm, small)
    with Gate(batcher):
        fits = batcher.submit(variant, small[:3])
        mixed = batcher.submit(variant, [small[3], large, small[4]])
        also_fits = batcher.submit(variant, small[5:])
        limit_pass_tokens(monkeypatch, 100)
    with pytest.raises(OutOfMemory, match="no memory for a row of 150 tokens"):
        mixed.result(60)
    for future, scores in ((fits, expected[:3]), (also_fits, expected[5:])):
        for answer, reference in zip(future.result(60), scores, strict=True):
            assert answer.totals == pytest.approx(reference.totals, abs=1e-4)


def test_an_empty_request_is_answered_at_once(lm: PackedLM, batcher: Batcher) -> None:
    assert batcher.submit(ModelVariant(lm=lm), []).result(0) == []


def test_closing_cancels_requests_that_wait(lm: PackedLM) -> None:
    batcher = Batcher()
    closing: Callable[[], None] = batcher.close
    with Gate(batcher):
        waiting = batcher.submit(ModelVariant(lm=lm), examples(2))
        thread = threading.Thread(target=closing)
        thread.start()
        while not batcher._closed:
            pass
    thread.join(60)
    with pytest.raises(CancelledError):
        waiting.result(60)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(ModelVariant(lm=lm), examples(1))


def test_decode_steps_alternate_with_scoring_passes(lm: PackedLM, batcher: Batcher) -> None:
    @dataclass
    class Writing:
        left: int = 5

        @property
        def is_busy(self) -> bool:
            return self.left > 0

        def step(self) -> None:
            self.left -= 1
            if self.left == 3:
                raise RuntimeError("told to those who wait")

        def fail(self, fault: Exception) -> None:
            raise AssertionError(fault)

    writing = Writing()
    batcher.schedule(writing)
    assert batcher.submit(ModelVariant(lm=lm), examples(2)).result(60) == score(lm, examples(2))
    batcher.run(lambda: None)
    while writing.left:
        batcher.run(lambda: None)
    batcher.run(lambda: None)
    assert batcher._decode_work == []


def test_closing_cancels_texts_that_wait(lm: PackedLM) -> None:
    errors: list[Exception] = []

    class Writing:
        is_busy = True

        def step(self) -> None:
            pass

        def fail(self, fault: Exception) -> None:
            errors.append(fault)

    batcher = Batcher()
    batcher.schedule(Writing())
    batcher.close()
    assert [type(fault) for fault in errors] == [CancelledError]
