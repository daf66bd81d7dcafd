"""How a stage will run on this machine: on which rung of the cache, compiled or not, in passes of which size, and how
much memory that takes. Decided before the stage starts, kept in its checkpoints, because all of it moves bits.

It does NOT train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heft_engine.adapters import parity
from heft_engine.adapters.adapter import Adapter, Boundary
from heft_engine.config.flops import CacheLevel
from heft_engine.config.train import Auto, Stage
from heft_engine.data.encoding import Example
from heft_engine.inference.partition import TOKEN_BUDGET as SCORING_BUDGET
from heft_engine.model.loss import supervised_loss
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import fill, packed_length
from heft_engine.objectives.registry import create
from heft_engine.runtime import devices, malloc
from heft_engine.training import memory_plan
from heft_engine.training.cache_plan import CacheBudget, CachePlan, plan_cache
from heft_engine.training.compile import compiled_layers, pays
from heft_engine.training.forward_pass import pass_tokens, split_by_tokens
from heft_engine.training.loop import TOKEN_BUDGET, Progress
from heft_engine.training.low_memory_layers import low_memory_layers
from heft_engine.training.memory_plan import Fit, Footprint
from heft_engine.training.schedule import epoch_order

#: The largest pass is looked for in the first epochs, up to so many rows: a thousand epochs would take as long as some
#: stages to count out, and hardly hold a larger one.
COUNTED_ROWS = 200_000


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """cache, validation_cache: the rungs. memory_bytes: the most that the process will hold while the stage runs."""

    cache: CachePlan
    validation_cache: CachePlan
    compiled: bool
    compile_failure: str | None
    token_budget: int
    checkpointing: bool
    memory_bytes: int

    @property
    def of_progress(self) -> dict[str, Any]:
        """What checkpoints carry, by the names of `training.Progress`."""
        return {name: getattr(self, name) for name in ("token_budget", "compiled", "checkpointing")}


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What a plan is made from.

    `room`: bytes the process may take beyond what it holds; None: its share of what is free.
    """

    lm: PackedLM
    stage: Stage
    index: int
    seed: int
    trainable: Adapter
    boundary: Boundary
    examples: Sequence[Example]
    validation: Sequence[Example]
    budget: CacheBudget
    compile: bool | Auto
    cache_dir: Path | None
    room: int | None = None
    #: Of training and validation rows, when it is known already; None chooses by the budget, training rows first.
    caches: tuple[CachePlan, CachePlan] | None = None

    @contextmanager
    def planned(self, earlier: Progress | None) -> Iterator[StagePlan]:
        """The plan, in force inside. `earlier`: the progress in a checkpoint, whose decisions stand.

        Raises TrainingError (out_of_memory) for a stage that can't fit.
        """
        malloc.trim()
        caches = self._caches(earlier)
        with ExitStack() as stack:
            stack.callback(malloc.trim)
            compiled, failure = self._compile(stack, caches[0], earlier)
            if not compiled:
                stack.enter_context(low_memory_layers(self.lm))
            fitted = self._fit(caches) if earlier is None else self._as_before(caches[0], earlier)
            stack.callback(setattr, self.lm, "checkpointing", False)
            self.lm.checkpointing = fitted.checkpointing
            yield StagePlan(
                cache=caches[0],
                validation_cache=caches[1],
                compiled=compiled,
                compile_failure=failure,
                token_budget=fitted.token_budget,
                checkpointing=fitted.checkpointing,
                memory_bytes=self._total(caches, fitted),
            )

    def _caches(self, earlier: Progress | None) -> tuple[CachePlan, CachePlan]:
        if self.caches is not None:
            return self.caches
        if earlier is not None:
            return CachePlan.from_json(earlier.cache or {}), CachePlan.from_json(
                earlier.validation_cache or {}
            )
        training = plan_cache(self.lm, self.boundary, self.examples, self.budget)
        return training, plan_cache(self.lm, self.boundary, self.validation, self.budget.without(training))

    # -- compiling --------------------------------------------------------------------------------------------------

    def _compile(
        self, stack: ExitStack, cache: CachePlan, earlier: Progress | None
    ) -> tuple[bool, str | None]:
        """Whether layers run compiled, and what went wrong if they should and can't."""
        tokens = self.stage.n_epochs * sum(map(packed_length, self.examples))
        wanted = pays(self.lm, tokens) if self.compile == "auto" else self.compile
        if not (earlier.compiled if earlier is not None else wanted and cache.level == CacheLevel.NONE):
            return False, None
        failure = stack.enter_context(
            compiled_layers(self.lm, self.boundary.layer, self._try_out, self.cache_dir)
        )
        return failure is None, None if failure is None else f"{type(failure).__name__}: {failure}"[:300]

    def _try_out(self) -> None:
        """A pass over two short rows that leaves no trace."""
        short = sorted(self.examples, key=packed_length)[:2]
        with torch.random.fork_rng():
            length = fill(self.lm.device, sum(map(packed_length, short)))
            supervised_loss(self.lm, short, length)[0].backward()  # type: ignore[no-untyped-call]
        for parameter in self.trainable.parameters().values():
            parameter.grad = None

    # -- memory -----------------------------------------------------------------------------------------------------

    def _fit(self, caches: tuple[CachePlan, CachePlan]) -> Fit:
        room = self.room
        if room is None:
            room = devices.memory_share(self.lm.device, self.budget.sharers)
        room = int((room - self._standing(caches)) / memory_plan.OVERHEAD) - self._head()
        longest = max(map(packed_length, self.examples))

        def largest(found: Footprint, budget: int) -> float:
            return max(self._pass_bytes(found, caches[0], part) for part in self._parts(caches[0], budget))

        return memory_plan.fit(room, TOKEN_BUDGET, largest, longest, self._footprint, self.stage.type)

    def _as_before(self, cache: CachePlan, earlier: Progress) -> Fit:
        """The passes of a checkpoint, whatever is free by now: another cut would round otherwise."""
        found = self._footprint(earlier.checkpointing)
        parts = self._parts(cache, earlier.token_budget)
        needed = max(self._pass_bytes(found, cache, part) for part in parts)
        return Fit(token_budget=earlier.token_budget, checkpointing=earlier.checkpointing, bytes=int(needed))

    def _parts(self, cache: CachePlan, budget: int) -> set[tuple[int, ...]]:
        """The rows of every pass."""
        rows, size = len(self.examples), self.stage.batch_size
        epochs = min(self.stage.n_epochs, max(1, COUNTED_ROWS // rows))
        orders = (epoch_order(self.seed, self.index, epoch, rows) for epoch in range(epochs))
        steps = (order[start : start + size] for order in orders for start in range(0, rows, size))
        return {tuple(part) for step in steps for part in split_by_tokens(self._weight(cache), step, budget)}

    def _lengths(self, cache: CachePlan, parts: set[tuple[int, ...]]) -> int:
        """How many lengths passes have, with a gradient and without."""
        skipped = [sum(self._skipped(cache, index) for index in part) for part in parts]
        tokens = [sum(packed_length(self.examples[index]) for index in part) for part in parts]
        with_gradient = {whole - left for whole, left in zip(tokens, skipped, strict=True)}
        if cache.level == CacheLevel.KV:
            return len(with_gradient)
        device = self.lm.device
        if cache.level == CacheLevel.HIDDEN_STATES:
            return len(with_gradient) + len({fill(device, left) for left in skipped})
        return len({fill(device, whole) for whole in tokens})

    def _footprint(self, checkpointing: bool) -> Footprint:
        self.lm.checkpointing = checkpointing
        try:
            with torch.random.fork_rng():
                return memory_plan.footprint(self.lm)
        finally:
            self.lm.checkpointing = False

    def _weight(self, cache: CachePlan) -> Any:
        return lambda index: pass_tokens(cache.level, self.examples[index], self._skipped(cache, index))

    def _skipped(self, cache: CachePlan, index: int) -> int:
        """Tokens of a row that run without a gradient."""
        if cache.level == CacheLevel.NONE:
            return 0
        return self.boundary.first_token(len(self.examples[index].prompt))

    def _pass_bytes(self, found: Footprint, cache: CachePlan, part: Sequence[int]) -> float:
        rows = [self.examples[index] for index in part]
        skipped = [self._skipped(cache, index) for index in part]
        with_gradient = [packed_length(row) - left for row, left in zip(rows, skipped, strict=True)]
        if cache.level == CacheLevel.NONE:
            tokens = sum(with_gradient)
            with_gradient.append(fill(self.lm.device, tokens) - tokens)
        total = found.of(with_gradient)
        if cache.level != CacheLevel.NONE:
            kv_heads, width = self.lm.kv_shape
            a_token = 2 * kv_heads * width * (self.lm.n_layers - self.boundary.layer) * self.lm.dtype.itemsize
            copies = 1 if cache.level == CacheLevel.KV else 2
            total += copies * len(part) * max(skipped) * a_token
        if cache.level == CacheLevel.HIDDEN_STATES:
            total += memory_plan.pass_bytes(self.lm, sum(skipped))
        return total

    def _head(self) -> int:
        """Of logits, in a step of the rows with the longest answers."""
        tokens = sorted(sum(map(len, example.answers)) for example in self.examples)
        return create(self.stage.objective).loss_bytes(self.lm, sum(tokens[-self.stage.batch_size :]))

    def _standing(self, caches: tuple[CachePlan, CachePlan]) -> int:
        """What stays for the whole stage: caches in memory, gradients, Adam's state."""
        cached = sum(cache.bytes for cache in caches if not cache.on_disk)
        return cached + memory_plan.gradient_bytes(list(self.trainable.parameters().values()))

    def _total(self, caches: tuple[CachePlan, CachePlan], fitted: Fit) -> int:
        lm = self.lm
        parts = self._parts(caches[0], fitted.token_budget)
        code = memory_plan.code_bytes(lm, self._lengths(caches[0], parts))
        training = fitted.bytes + self._head()
        scoring = memory_plan.pass_bytes(lm, SCORING_BUDGET)
        merging = self._merging() if self.trainable.merges and lm.device.type == "cpu" else 0
        most = max(int(memory_plan.OVERHEAD * training), scoring, merging)
        return devices.resident_bytes(lm.device) + self._standing(caches) + code + most

    def _merging(self) -> int:
        """The merge is held to a copy of the model in float32, which always lies on the CPU, on a few of the rows."""
        longest = max(map(packed_length, self.examples))
        tokens = max(longest, min(parity.TOKEN_BUDGET, parity.PROBE_ROWS * longest))
        return 4 * self.lm.parameters + memory_plan.pass_bytes(self.lm, tokens) * 4 // self.lm.dtype.itemsize
