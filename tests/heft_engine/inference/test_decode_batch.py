"""Continuous batching: the tokens of a sequence do not depend on the sequences that join and leave."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_limit import limit_pass_tokens
from tiny_models import FAMILIES
from torch import Tensor

from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.inference import decode_batch as decode_batch_module
from heft_engine.inference import scheduler as scheduler_module
from heft_engine.inference.decode_batch import GREEDY, DecodeBatch, DecodeRequest, PassOutOfMemory
from heft_engine.inference.kv_cache import SLOTS_PER_CHUNK, KVCache, Slot, capacity_for
from heft_engine.inference.sampling import SampledToken, SamplingParams
from heft_engine.inference.scheduler import MAX_SEQUENCES, DecodeScheduler, SequenceOutOfMemory
from heft_engine.model import batch_invariant
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.batch_invariant import BLOCK_ROWS, STEP_ROWS
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM

MakeModel = Callable[[str], Path]
PLENTY = 2**30
EXACT = SamplingParams(top_logprobs=0)
#: Shorter and longer than the windows of 16; some outgrow their slots of 64, 96 and 128 tokens.
LENGTHS = (60, 3, 21, 93, 40, 2, 63)


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> PackedLM:
    """Returns a model with an intervention that is strong enough to change tokens."""
    lm = PackedLM(load_model(resolve_path(path), dtype=dtype, attention=IMPLEMENTATION))
    torch.manual_seed(0)
    intervention = LoreftIntervention(lm.hidden_size, 4)
    torch.nn.init.normal_(intervention.bias)
    intervention.freeze()
    lm.interventions.add(PlacedIntervention(layer=1, positions="f1+l1", intervention=intervention))
    return lm


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> PackedLM:
    return loaded(tiny_llama_dir)


def request_for(name: int, length: int, max_tokens: int = 6, **options: object) -> DecodeRequest:
    rng = random.Random(f"{name}/{length}")
    prompt = tuple(rng.randrange(5, 600) for _ in range(length))
    return DecodeRequest(id=name, prompt=prompt, max_tokens=max_tokens, **options)  # type: ignore[arg-type]


class TokenCollector:
    """Collects the sampled tokens of each sequence, and removes a sequence from the batch at its last token."""

    def __init__(self, batch: DecodeBatch, requests: Sequence[DecodeRequest]) -> None:
        self.batch = batch
        self.most = {request.id: request.max_tokens for request in requests}
        self.tokens: dict[Hashable, list[SampledToken]] = {}

    def take(self, new: Mapping[Hashable, SampledToken]) -> None:
        for request_id, sampled in new.items():
            self.tokens.setdefault(request_id, []).append(sampled)
            if len(self.tokens[request_id]) == self.most[request_id]:
                self.batch.remove(request_id)


def alone(lm: PackedLM, requests: Sequence[DecodeRequest]) -> dict[Hashable, list[SampledToken]]:
    """Returns the tokens of each request, decoded in a batch of its own."""
    tokens: dict[Hashable, list[SampledToken]] = {}
    for request in requests:
        batch = DecodeBatch(lm, budget_bytes=PLENTY)
        collector = TokenCollector(batch, [request])
        collector.take(batch.prefill([request]))
        while len(batch):
            collector.take(batch.decode())
        tokens |= collector.tokens
    return tokens


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES]
    + [(family, torch.bfloat16) for family in ("llama", "mistral", "gemma2", "gpt_neox")],
)
def test_tokens_do_not_depend_on_who_joins_and_leaves(
    make_tiny_model: MakeModel, family: str, dtype: torch.dtype
) -> None:
    """Bit for bit: the log-probabilities are compared, too."""
    lm = loaded(make_tiny_model(family), dtype)
    requests = [request_for(name, length, sampling=EXACT) for name, length in enumerate(LENGTHS)]
    batch = DecodeBatch(lm, budget_bytes=PLENTY)
    collector = TokenCollector(batch, requests)
    collector.take(batch.prefill(requests[:3]))
    collector.take(batch.decode())
    collector.take(batch.prefill(requests[3:4]))
    batch.remove(1)
    collector.take(batch.decode())
    collector.take(batch.prefill(requests[4:]))
    while len(batch):
        collector.take(batch.decode())
    expected = alone(lm, requests)
    expected[1] = expected[1][:2]  # it left before its end
    assert collector.tokens == expected
    assert batch.allocated_bytes == 0


@pytest.mark.usefixtures("batch_invariant")
def test_each_request_has_its_own_scale(tiny_llama_dir: Path) -> None:
    llama, scales = loaded(tiny_llama_dir), (1.0, 0.0, 0.5, 3.0)
    requests = [request_for(0, 30, scale=scale, sampling=EXACT) for scale in scales]
    named = [DecodeRequest(**{**vars(request), "id": i}) for i, request in enumerate(requests)]
    expected = alone(llama, named)
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    collector = TokenCollector(batch, named)
    collector.take(batch.prefill(named))
    while len(batch):
        collector.take(batch.decode())
    assert collector.tokens == expected
    assert len({choices[0].logprob for choices in expected.values()}) == 4, "a scale that changes nothing"
    with llama.interventions.disabled():
        assert alone(llama, named[:1])[0] == expected[1]


def test_keys_and_values_stay_within_their_budget(llama: PackedLM) -> None:
    """Sequences without room wait in order. A slot is no larger than its sequence needs, and is freed at its end."""
    requests = [request_for(name, 50 + name, max_tokens=20) for name in range(9)]
    batch = DecodeBatch(llama, budget_bytes=0)
    room = batch.bytes_for(requests[0])
    assert room == 2 * 4 * 2 * 8 * capacity_for(69) * 4  # two tensors a layer, heads, width, tokens, float32
    batch = DecodeBatch(llama, budget_bytes=4 * room)
    scheduler = DecodeScheduler(batch)
    scheduler.add(requests)
    collector = TokenCollector(batch, requests)
    most, sizes = 0, []
    while scheduler.is_busy:
        new = scheduler.step()
        most, sizes = max(most, batch.allocated_bytes), [*sizes, len(batch)]
        collector.take(new)
    assert collector.tokens == alone(llama, requests)
    assert list(collector.tokens) == list(range(9))
    assert max(sizes) == 4
    assert 2 * room < most <= batch.budget_bytes
    assert batch.allocated_bytes == 0


def test_many_sequences_fill_several_chunks(llama: PackedLM) -> None:
    requests = [request_for(name, 4, max_tokens=2) for name in range(2 * SLOTS_PER_CHUNK + 1)]
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add(requests)
    collector = TokenCollector(scheduler.batch, requests)
    while scheduler.is_busy:
        collector.take(scheduler.step())
    sampled = requests[:: SLOTS_PER_CHUNK // 2]
    assert {request.id: collector.tokens[request.id] for request in sampled} == alone(llama, sampled)
    assert len(collector.tokens) == len(requests) <= MAX_SEQUENCES


def test_prefills_and_decode_steps_alternate(llama: PackedLM) -> None:
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add([request_for(name, 1_500, max_tokens=9) for name in range(3)])
    passes = [list(scheduler.step()) for _ in range(6)]
    assert passes == [[0], [0], [1], [0, 1], [2], [0, 1, 2]]


def test_a_prefill_that_fails_leaves_nothing(llama: PackedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    first = batch.prefill([request_for(0, 10)])
    allocated_bytes = batch.allocated_bytes

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(llama, "finish", fail)
        with pytest.raises(PassOutOfMemory):
            batch.prefill([request_for(1, 10)])
    assert (len(batch), batch.allocated_bytes) == (1, allocated_bytes)
    tokens = [first[0], *(batch.decode()[0] for _ in range(2))]
    assert tokens == alone(llama, [request_for(0, 10)])[0][:3]


def finished(
    lm: PackedLM, requests: Sequence[DecodeRequest], later: Sequence[DecodeRequest] = ()
) -> tuple[dict[Hashable, list[int]], list[int]]:
    """Returns the tokens of every request, and the number of sequences in the batch after each step.

    later: requests that come after the first step.
    """
    batch = DecodeBatch(lm, budget_bytes=PLENTY)
    scheduler, sizes = DecodeScheduler(batch), []
    scheduler.add(requests)
    tokens: dict[Hashable, list[int]] = {request.id: [] for request in (*requests, *later)}
    most = {request.id: request.max_tokens for request in (*requests, *later)}
    while scheduler.is_busy:
        for request_id, sampled in scheduler.step().items():
            tokens[request_id].append(sampled.token)
        if not sizes:
            scheduler.add(later)
        sizes.append(len(batch))
        for request_id, generated in tokens.items():
            if len(generated) == most[request_id]:
                scheduler.abort(request_id)
    assert batch.allocated_bytes == 0
    return tokens, sizes


@pytest.mark.usefixtures("batch_invariant")
def test_a_prefill_without_memory_is_run_again_with_fewer_requests(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded(tiny_llama_dir)
    requests = [request_for(name, 40) for name in range(8)]
    expected, sizes = finished(llama, requests)
    assert sizes[0] == 8
    passes = limit_pass_tokens(monkeypatch, 100)
    tokens, sizes = finished(llama, requests)
    assert tokens == expected, "no request is lost"
    assert passes[:3] == [320, 160, 80]
    assert max(sizes) == 2, "the others wait until sequences have left"
    assert len([size for size in passes if size > 100]) < len(requests)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("layer", [0, 2])
def test_slots_without_memory_are_taken_back(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """Memory that runs out between two layers of a chunk leaves all layers alike, for the sequences that run."""
    llama = loaded(tiny_llama_dir)
    running, later = ([request_for(name, 40) for name in names] for names in (range(3), range(3, 6)))
    expected, _ = finished(llama, running, later)
    cat, calls = torch.cat, []

    def limited(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        if len(tensors) == 2 and tensors[0].dim() == 5 and tensors[0].shape[1] == 3:
            calls.append(1)
            if (len(calls) - 1) % 4 == layer:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", limited)
    tokens, sizes = finished(llama, running, later)
    assert tokens == expected
    assert max(sizes) == 3
    assert calls


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.2, seed=3, frequency_penalty=0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_without_memory_are_preempted_and_go_on_where_they_were(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str, sampling: SamplingParams
) -> None:
    """Four sequences outgrow their slots, and there is memory for two of the next size."""
    lm = loaded(make_tiny_model(family))
    requests = [request_for(name, 60, max_tokens=12, sampling=sampling) for name in range(4)]
    expected, sizes = finished(lm, requests)
    assert set(sizes) == {4}
    insert = KVCache._insert
    limit = 3 * KVCache(lm, PLENTY).bytes_for(96)

    def limited(cache: KVCache, slot: Slot, capacity: int) -> None:
        if cache.allocated_bytes + cache.bytes_for(capacity) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        insert(cache, slot, capacity)

    monkeypatch.setattr(KVCache, "_insert", limited)
    tokens, sizes = finished(lm, requests)
    assert tokens == expected
    assert sizes[0] == 4
    assert 2 in sizes


def test_a_preempted_request_can_be_aborted(llama: PackedLM) -> None:
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    batch.prefill([request_for(0, 10), request_for(1, 10)])
    (preempted,) = batch.preempt(1)
    assert (preempted.id, len(batch)) == (1, 1)
    batch.remove(1)
    first = batch.prefill([request_for(1, 10)])
    assert first[1].token == alone(llama, [request_for(1, 10)])[1][0].token, "it begins anew"


def test_a_prefill_counts_the_tokens_that_preempted_requests_compute_again(
    llama: PackedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_PREFILL_TOKENS", 25)
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add([request_for(0, 10, max_tokens=9), request_for(1, 10, max_tokens=9)])
    assert len(scheduler.step()) == 2, "together"
    for _ in range(4):
        scheduler.step()
    preempted = scheduler.batch.preempt(2)
    assert [scheduler.batch.prefill_tokens(request) for request in preempted] == [15, 15]
    scheduler.add(preempted)
    assert len(scheduler.step()) == 1, "one after the other"


def test_slots_are_freed_after_the_failed_pass(llama: PackedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch's exception lives, so do the tensors of the pass, and freeing a slot copies the others."""
    errors: list[type[BaseException] | None] = []
    free = KVCache.free

    def recording(cache: KVCache, slot: Slot) -> None:
        errors.append(sys.exc_info()[0])
        free(cache, slot)

    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(KVCache, "free", recording)
    monkeypatch.setattr(llama, "run_layers", fail)
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    with pytest.raises(PassOutOfMemory):
        batch.prefill([request_for(0, 10), request_for(1, 10)])
    assert errors == [PassOutOfMemory, PassOutOfMemory]
    assert batch.allocated_bytes == 0


def test_a_sequence_that_outgrows_memory_alone_fails(
    llama: PackedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add([request_for(0, 10)])
    scheduler.step()
    limit_pass_tokens(monkeypatch, 0)
    with pytest.raises(SequenceOutOfMemory, match="ask for fewer max_tokens"):
        scheduler.step()
    assert not scheduler.is_busy
    assert scheduler.batch.allocated_bytes == 0


def test_a_prompt_without_memory_fails_alone(llama: PackedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add([request_for(0, 300), request_for(1, 30, max_tokens=2)])
    limit_pass_tokens(monkeypatch, 100)
    with pytest.raises(SequenceOutOfMemory, match="no memory for a prompt of 300 tokens") as failed:
        scheduler.step()
    assert (failed.value.request_id, failed.value.code) == (0, "out_of_memory")
    assert list(scheduler.step()) == [1]
    scheduler.abort(1)
    assert not scheduler.is_busy


def test_an_oversized_prompt_is_not_tried_again_at_each_departure(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs the memory of all others, who leave one by one."""
    llama = loaded(tiny_llama_dir)
    scheduler = DecodeScheduler(DecodeBatch(llama, budget_bytes=PLENTY))
    scheduler.add([request_for(name, 20, max_tokens=2 + name) for name in range(6)])
    scheduler.step()
    scheduler.add([request_for(9, 300, max_tokens=2), request_for(10, 20, max_tokens=1)])
    passes = limit_pass_tokens(monkeypatch, 200)
    left = 0
    while len(scheduler.batch) > 1:
        for request_id, _ in list(scheduler.step().items()):
            if len(scheduler.batch._sequences[request_id].generated) == 2 + int(str(request_id)):
                scheduler.abort(request_id)
                left += 1
    assert left == 5
    assert passes.count(300) == 1
    scheduler.abort(next(iter(scheduler.batch._sequences)))
    with pytest.raises(SequenceOutOfMemory, match="300 tokens"):
        scheduler.step()
    assert passes.count(300) == 2, "alone"
    assert list(scheduler.step()) == [10]


def test_a_prompt_is_tried_again_when_what_it_needs_has_been_freed(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded(tiny_llama_dir)
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    scheduler = DecodeScheduler(batch)
    scheduler.add([request_for(name, 30, max_tokens=30) for name in range(4)])
    scheduler.step()
    large = request_for(9, 100, max_tokens=2)
    assert 2 * batch.bytes_for(large) == batch.allocated_bytes
    with monkeypatch.context() as patch:
        passes = limit_pass_tokens(patch, 50)
        scheduler.add([large])
        scheduler.step()
        scheduler.step()
    assert 100 in passes
    for name in range(2):
        scheduler.abort(name)
        admitted = 9 in scheduler.step() or 9 in scheduler.step()
        assert admitted == (name == 1), "two of the others' slots are as large as its own"


class MemoryLimit:
    """Lets calls fail for lack of memory: those whose number, from 0, is in `failing`."""

    def __init__(self, call: Callable[..., Any], failing: Callable[[int], bool]) -> None:
        self.call, self.failing, self.calls = call, failing, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.failing(self.calls - 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.call(*arguments, **options)


SAMPLED = SamplingParams(temperature=1.2, seed=3, frequency_penalty=0.5, top_logprobs=2)


@pytest.mark.usefixtures("batch_invariant")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("function", ["mask_tokens", "argmax"])
def test_tokens_of_many_sequences_without_memory_are_chosen_in_parts(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, function: str
) -> None:
    """Memory suffices for the choice of two sequences' tokens at a time."""
    llama = loaded(tiny_llama_dir)
    requests = [request_for(name, 20, max_tokens=5, sampling=sampling) for name in range(5)]
    expected, _ = finished(llama, requests)
    owner: Any = decode_batch_module if function == "mask_tokens" else Tensor
    call, refused = getattr(owner, function), []

    def limited(logits: Tensor, *arguments: Any, **options: Any) -> Any:
        if logits.dim() == 2 and len(logits) > 2:
            refused.append(len(logits))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(logits, *arguments, **options)

    monkeypatch.setattr(owner, function, limited)
    tokens, sizes = finished(llama, requests)
    assert tokens == expected
    assert max(sizes) == 5
    assert refused


@pytest.mark.usefixtures("batch_invariant")
def test_a_token_that_runs_out_of_memory_once_is_the_same_the_second_time(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded(tiny_llama_dir)
    requests = [request_for(name, 20, max_tokens=5, sampling=SAMPLED) for name in range(3)]
    expected, _ = finished(llama, requests)
    for function in ("softmax", "log_softmax", "searchsorted"):
        with monkeypatch.context() as patch:
            limit = MemoryLimit(getattr(torch, function), lambda number: number % 2 == 0)
            patch.setattr(torch, function, limit)
            tokens, _ = finished(llama, requests)
        assert limit.calls == 2 * 3 * 5
        if function != "searchsorted":  # after the random number was drawn, and smaller than any other
            assert tokens == expected


def test_a_sequence_whose_token_there_is_no_memory_for_fails_alone(
    llama: PackedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    requests = [request_for(name, 20, sampling=SAMPLED if name == 1 else GREEDY) for name in range(3)]
    assert len(batch.prefill(requests)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(torch, "softmax", MemoryLimit(torch.softmax, lambda number: True))
        assert list(batch.decode()) == [0, 2]
    (failed,) = batch.take_failed().items()
    assert (failed[0], getattr(failed[1], "code", None)) == (1, "out_of_memory")
    assert sorted(batch.decode()) == [0, 2]
    batch.remove(0)
    batch.remove(2)
    assert batch.allocated_bytes == 0


def test_memory_that_a_failed_slot_leaves_behind_is_counted(
    llama: PackedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for a new slot, nor to copy the slots back that have grown already."""
    cache = KVCache(llama, PLENTY)
    slots = [cache.allocate(10, 20) for _ in range(3)]
    before = cache.allocated_bytes
    assert before == 3 * cache.bytes_for(10)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", MemoryLimit(torch.cat, lambda number: number == 1))
        patch.setattr(Tensor, "clone", MemoryLimit(Tensor.clone, lambda number: True))
        with pytest.raises(torch.OutOfMemoryError):
            cache.allocate(10, 20)
    grown = cache.allocated_bytes - before
    assert grown == cache.bytes_for(10) // llama.n_layers, "of the first layer"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", MemoryLimit(torch.cat, lambda number: number == 1))
        with pytest.raises(torch.OutOfMemoryError):
            cache.allocate(10, 20)
    assert cache.allocated_bytes == before, "and is returned at the next opportunity"
    for slot in slots:
        cache.free(slot)
    assert cache.allocated_bytes == cache.reserved_bytes == 0


def test_a_sequence_at_its_end_must_leave(llama: PackedLM) -> None:
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    batch.prefill([request_for(0, 10, max_tokens=1)])
    with pytest.raises(ValueError, match="must be removed"):
        batch.decode()
    batch.remove(0)
    batch.remove("nobody")
    assert batch.decode() == {}


def test_a_seed_gives_the_same_tokens_in_any_batch(llama: PackedLM) -> None:
    def drawn(name: int, seed: int | None) -> DecodeRequest:
        sampling = SamplingParams(temperature=1.5, top_p=0.9, seed=seed, frequency_penalty=0.1)
        return DecodeRequest(id=name, prompt=request_for(7, 30).prompt, max_tokens=8, sampling=sampling)

    requests = [drawn(0, 3), drawn(1, 4), drawn(2, 3), drawn(3, None), request_for(4, 12, max_tokens=3)]
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    collector = TokenCollector(batch, requests)
    collector.take(batch.prefill(requests[:1]))
    collector.take(batch.decode())
    collector.take(batch.prefill(requests[1:]))
    while len(batch):
        collector.take(batch.decode())
    assert collector.tokens[0] == collector.tokens[2] == alone(llama, [drawn(0, 3)])[0]
    assert collector.tokens[1] != collector.tokens[0] != collector.tokens[3]


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (2_048, 2_048), (2_049, 3_072)],
)
def test_capacities_grow_by_about_half(tokens: int, capacity: int) -> None:
    assert capacity_for(tokens) == capacity


@pytest.mark.usefixtures("batch_invariant")
def test_steps_multiply_in_blocks_of_fewer_rows(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = loaded(tiny_llama_dir)
    seen: list[int] = []
    multiply = batch_invariant.linear_in_blocks

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, block_rows: int) -> Tensor:
        if weight is not llama.head.weight:
            seen.append(block_rows)
        return multiply(x, weight, bias, block_rows)

    monkeypatch.setattr(batch_invariant, "linear_in_blocks", linear)
    batch = DecodeBatch(llama, budget_bytes=PLENTY)
    batch.prefill([request_for(0, 12)])
    assert set(seen) == {BLOCK_ROWS}
    seen.clear()
    batch.decode()
    assert set(seen) == {STEP_ROWS}
