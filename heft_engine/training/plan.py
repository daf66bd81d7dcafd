"""The plan of a stage on this machine: its cache's level, compiled layers or not, the size of its passes, its memory.

It is made before the stage starts and carried by its checkpoints, because all of it changes how sums are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from heft_engine.adapters import parity
from heft_engine.adapters.adapter import Boundary
from heft_engine.config.flops import CacheLevel
from heft_engine.data.encoding import Example
from heft_engine.errors import TrainingError
from heft_engine.inference.partition import TOKEN_BUDGET as SCORING_BUDGET
from heft_engine.model.loss import supervised_loss
from heft_engine.model.nf4 import quantized_sizes
from heft_engine.model.packing import fill, packed_length
from heft_engine.objectives.registry import create
from heft_engine.runtime import devices, malloc
from heft_engine.training.compile import compiled_layers, pays
from heft_engine.training.forward_pass import pass_tokens, split_by_tokens
from heft_engine.training.memory import memory_plan
from heft_engine.training.memory.cache_plan import CachePlan, plan_cache
from heft_engine.training.memory.low_memory_layers import low_memory_layers
from heft_engine.training.memory.memory_plan import Fit, Footprint
from heft_engine.training.progress import TOKEN_BUDGET, Progress
from heft_engine.training.schedule import epoch_order
from heft_engine.training.stage_inputs import StageInputs, StageOptions

#: Tokens of one micro-batch on a GPU, at most: there each pass costs thousands of launches.
GPU_TOKEN_BUDGET = 16_384
#: The largest pass is searched in the first epochs, up to this many rows: counting out a thousand epochs would take as
#: long as some stages, and hardly find a larger one.
COUNTED_ROWS = 200_000


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """compile_failure: why layers that should run compiled do not.

    memory_bytes: predicted peak of the process on the model's device. host_memory_bytes: what the stage adds beside it
    in the machine's memory, if the device is a GPU.
    """

    cache: CachePlan
    validation_cache: CachePlan
    compiled: bool
    compile_failure: str | None
    token_budget: int
    checkpointing: bool
    memory_bytes: int
    host_memory_bytes: int = 0

    @property
    def as_progress(self) -> Progress:
        """The plan as the progress of a stage that has yet to start, in which checkpoints carry it."""
        return Progress(
            token_budget=self.token_budget,
            compiled=self.compiled,
            checkpointing=self.checkpointing,
            cache=self.cache.to_json(),
            validation_cache=self.validation_cache.to_json(),
        )


@contextmanager
def plan_stage(
    inputs: StageInputs,
    options: StageOptions,
    earlier: Progress | None = None,
    *,
    caches: tuple[CachePlan, CachePlan] | None = None,
) -> Iterator[StagePlan]:
    """Yields the plan of a stage; its layers run by it inside.

    earlier: progress in a checkpoint, whose decisions are kept. caches: of training and validation rows; None: the
    highest levels that the budget allows, training rows first. Raises TrainingError (out_of_memory) for a stage that
    does not fit.
    """
    malloc.trim()
    lm = inputs.lm
    cache, validation_cache = caches or _plan_caches(inputs, options, earlier)
    with ExitStack() as stack:
        stack.callback(malloc.trim)
        compiled, failure = False, None
        if _should_compile(inputs, options, cache, earlier):
            compile_layers = compiled_layers(
                lm, inputs.adapter.boundary().layer, partial(_try_out, inputs), options.cache_dir
            )
            failure = stack.enter_context(compile_layers)
            compiled = failure is None
        if not compiled:
            stack.enter_context(low_memory_layers(lm))
        passes = _Passes(inputs=inputs, boundary=inputs.adapter.boundary(), level=cache.level)
        fixed = _fixed_bytes(inputs, cache, validation_cache)
        free = _free_bytes(options, lm.device) - fixed
        passes.check_merge(free)
        fit = passes.fit(free) if earlier is None else passes.fit_as(earlier)
        stack.callback(setattr, lm, "checkpointing", False)
        lm.checkpointing = fit.checkpointing
        yield StagePlan(
            cache=cache,
            validation_cache=validation_cache,
            compiled=compiled,
            compile_failure=None if failure is None else f"{type(failure).__name__}: {failure}"[:300],
            token_budget=fit.token_budget,
            checkpointing=fit.checkpointing,
            memory_bytes=devices.resident_bytes(lm.device) + fixed + passes.peak_bytes(fit),
            host_memory_bytes=_host_bytes(lm.device, cache, validation_cache),
        )


def _plan_caches(
    inputs: StageInputs, options: StageOptions, earlier: Progress | None
) -> tuple[CachePlan, CachePlan]:
    if earlier is not None:
        return CachePlan.from_json(earlier.cache or {}), CachePlan.from_json(earlier.validation_cache or {})
    boundary = inputs.adapter.boundary()
    training = plan_cache(inputs.lm, boundary, _held(inputs, inputs.examples), options.cache)
    budget = options.cache.without(training)
    return training, plan_cache(inputs.lm, boundary, _held(inputs, inputs.validation), budget)


def _held(inputs: StageInputs, examples: Sequence[Example]) -> list[Example]:
    """Returns the examples whose cached activations this rank would hold."""
    return [examples[row] for row in inputs.division(examples, fixed=True).held(inputs.ranks.rank)]


def _should_compile(
    inputs: StageInputs, options: StageOptions, cache: CachePlan, earlier: Progress | None
) -> bool:
    if earlier is not None:
        return earlier.compiled
    if cache.level != CacheLevel.NONE:
        return False
    if options.compile == "auto":
        return pays(inputs.lm, inputs.stage.n_epochs * sum(map(packed_length, inputs.examples)))
    return options.compile


def _try_out(inputs: StageInputs) -> None:
    """Runs a forward and backward pass over two short rows that leaves no trace."""
    short = sorted(inputs.examples, key=packed_length)[:2]
    with torch.random.fork_rng():
        length = fill(inputs.lm.device, sum(map(packed_length, short)))
        supervised_loss(inputs.lm, short, length)[0].backward()  # type: ignore[no-untyped-call]
    for parameter in inputs.adapter.parameters().values():
        parameter.grad = None


# -- memory ----------------------------------------------------------------------------------------------------------


def _free_bytes(options: StageOptions, device: torch.device) -> int:
    if options.memory_bytes is not None:
        return options.memory_bytes
    sharers = options.cache.sharers if device.type == "cpu" else options.sharers
    return devices.memory_share(device, sharers) - devices.reserved_bytes(device)


def _fixed_bytes(inputs: StageInputs, *caches: CachePlan) -> int:
    """Returns what the stage takes of the device from its start to its end.

    There are caches, gradients, Adam's state (with the backup of a step on a CPU), and a weight that is dequantised.
    """
    cached = sum(cache.bytes_on(inputs.lm.device) for cache in caches)
    gradients = memory_plan.gradient_bytes(list(inputs.adapter.parameters().values()))
    return cached + gradients + memory_plan.dequantized_bytes(inputs.lm)


def _host_bytes(device: torch.device, *caches: CachePlan) -> int:
    """Returns what caches take of the machine's memory beside a GPU's; 0 on a CPU, whose memory it is."""
    if device.type == "cpu":
        return 0
    return sum(cache.bytes_on(torch.device("cpu")) for cache in caches)


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """A stage's forward and backward passes, with the bytes that they take."""

    inputs: StageInputs
    boundary: Boundary
    level: CacheLevel

    def fit(self, free: int) -> Fit:
        """Cuts the passes so that they fit into `free` bytes. Raises TrainingError (out_of_memory)."""
        free = int(free / memory_plan.overhead(self.inputs.lm.device)) - self._loss_bytes()
        longest = max(map(packed_length, self.inputs.examples))

        def largest(footprint: Footprint, budget: int) -> float:
            return max(self._pass_bytes(footprint, rows) for rows in self._all(budget))

        kind = self.inputs.stage.type
        most = TOKEN_BUDGET if self.inputs.lm.device.type == "cpu" else GPU_TOKEN_BUDGET
        return memory_plan.fit(free, most, largest, longest, self._footprint, kind)

    def fit_as(self, earlier: Progress) -> Fit:
        """Returns the passes of a checkpoint, whatever is free by now: cut otherwise, sums would round otherwise."""
        footprint = self._footprint(earlier.checkpointing)
        needed = max(self._pass_bytes(footprint, rows) for rows in self._all(earlier.token_budget))
        return Fit(token_budget=earlier.token_budget, checkpointing=earlier.checkpointing, bytes=int(needed))

    def peak_bytes(self, fit: Fit) -> int:
        """Returns the most that passes take at a time: while training, measuring or merging."""
        lm = self.inputs.lm
        code = memory_plan.code_bytes(lm, self._distinct_lengths(self._all(fit.token_budget)))
        training = int(memory_plan.overhead(lm.device) * (fit.bytes + self._loss_bytes()))
        scoring = memory_plan.pass_bytes(lm, SCORING_BUDGET)
        merging = self._merge_bytes() + self.inputs.adapter.merge_bytes() if self.inputs.adapter.merges else 0
        return code + max(training, scoring, merging)

    def check_merge(self, free: int) -> None:
        """Raises TrainingError (out_of_memory) if the merge at the stage's end would not fit into `free` bytes."""
        growth = self.inputs.adapter.merge_bytes()
        if growth and (needed := growth + self._merge_bytes()) > free:
            message = (
                f"merging stage {self.inputs.stage.type} needs {needed / 1e9:.2g} GB, since merged weights are no "
                f"longer in 4 bits, and {max(0, free) / 1e9:.2g} GB are free for it; adapt fewer modules"
            )
            raise TrainingError(message, param="lora.target_modules", code="out_of_memory")

    def _all(self, budget: int) -> set[tuple[int, ...]]:
        """Returns the rows of every pass, cut to `budget` tokens."""
        inputs, rows, size = self.inputs, len(self.inputs.examples), self.inputs.stage.batch_size
        epochs = min(inputs.stage.n_epochs, max(1, COUNTED_ROWS // rows))
        orders = (epoch_order(inputs.seed, inputs.place, epoch, rows) for epoch in range(epochs))
        steps = (order[start : start + size] for order in orders for start in range(0, rows, size))
        division = inputs.division(inputs.examples, fixed=self.level != CacheLevel.NONE)
        shares = (share for step in steps for share in division.of(step))
        return {
            tuple(part) for share in shares for part in split_by_tokens(self._budgeted_tokens, share, budget)
        }

    def _budgeted_tokens(self, index: int) -> int:
        return pass_tokens(self.level, self.inputs.examples[index], self._cached_tokens(index))

    def _cached_tokens(self, index: int) -> int:
        """Returns the number of a row's tokens that run without a gradient."""
        if self.level == CacheLevel.NONE:
            return 0
        return self.boundary.first_token(len(self.inputs.examples[index].prompt))

    def _distinct_lengths(self, passes: set[tuple[int, ...]]) -> int:
        """Returns how many different numbers of tokens passes have, with a gradient and without."""
        examples, device = self.inputs.examples, self.inputs.lm.device
        cached = [sum(map(self._cached_tokens, rows)) for rows in passes]
        tokens = [sum(packed_length(examples[index]) for index in rows) for rows in passes]
        with_gradient = {total - part for total, part in zip(tokens, cached, strict=True)}
        if self.level == CacheLevel.KV:
            return len(with_gradient)
        if self.level == CacheLevel.HIDDEN_STATES:
            return len(with_gradient) + len({fill(device, part) for part in cached})
        return len({fill(device, total) for total in tokens})

    def _footprint(self, checkpointing: bool) -> Footprint:
        lm = self.inputs.lm
        with torch.random.fork_rng():
            layers = max(1, lm.n_layers - self.boundary.layer)
            return memory_plan.peak_footprint(lm, layers, checkpointing=checkpointing)

    def _pass_bytes(self, footprint: Footprint, rows: Sequence[int]) -> float:
        lm, examples = self.inputs.lm, self.inputs.examples
        cached = [self._cached_tokens(index) for index in rows]
        lengths = [packed_length(examples[index]) for index in rows]
        with_gradient = [length - part for length, part in zip(lengths, cached, strict=True)]
        if self.level == CacheLevel.NONE:
            with_gradient.append(fill(lm.device, sum(lengths)) - sum(lengths))
            return footprint.of(with_gradient)
        kv_heads, head_dim = lm.kv_shape
        per_token = 2 * kv_heads * head_dim * (lm.n_layers - self.boundary.layer) * lm.dtype.itemsize
        # Keys and values computed in the step are copied from there, and on a GPU each layer gathers its own.
        copies = 1 if self.level == CacheLevel.KV and lm.device.type == "cpu" else 2
        total = footprint.of(with_gradient) + copies * len(rows) * max(cached) * per_token
        if self.level == CacheLevel.HIDDEN_STATES:
            total += memory_plan.pass_bytes(lm, sum(cached))
        return total

    def _loss_bytes(self) -> int:
        """Returns the bytes of the loss in a step of the rows with the longest answers."""
        stage = self.inputs.stage
        tokens = sorted(sum(map(len, example.answers)) for example in self.inputs.examples)
        return create(stage.objective).loss_bytes(self.inputs.lm, sum(tokens[-stage.batch_size :]))

    def _merge_bytes(self) -> int:
        """Returns the bytes of a merge's check: float32 passes over probe rows, and one weight at a time in float32.

        There are the weight in float32, the adapter's change, and their sum; later slices of logits.
        """
        lm = self.inputs.lm
        longest = max(map(packed_length, self.inputs.examples))
        tokens = max(longest, min(parity.TOKEN_BUDGET, parity.PROBE_ROWS * longest))
        weight = max(*(p.numel() for p in lm.layers.parameters()), *quantized_sizes(lm.layers))
        passes = memory_plan.pass_bytes(lm, tokens) * 4 // lm.dtype.itemsize
        logits = min(parity.SLICE_BYTES, 4 * len(lm.head.weight) * (lm.hidden_size + 3 * tokens))
        return max(3 * 4 * weight + passes, logits)
