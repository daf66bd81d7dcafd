"""The library's part: one model on distinct rows and on repeated passages, and many models on one base."""

from __future__ import annotations

import argparse
import gc
import pkgutil
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import psutil
import torch

from benchmarks import rows
from benchmarks.baselines import load
from benchmarks.measure import matrix_rate
from benchmarks.serving import synthetic
from benchmarks.serving.baselines import Plain, Pyreft
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import infer_task
from heft_engine.data.task import Task
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.scoring import Scores
from heft_engine.model.base_models import load_tokenizer
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import packed_length
from heft_engine.runtime import parallel
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.row_adapters import adapt_rows

PREFIX_BYTES = 512 * 1024**2
#: What passes are made of: the functions that do it.
_OPERATIONS = {
    "matrix products (on matrix units with the norms and gated activations around them)": (
        ("heft_engine.model.batch_invariant:BatchInvariantMode", "linear"),
        *(("heft_engine.cpu.amx:AmxOps", name) for name in ("norm_linears", "linear", "gated_mlp")),
    ),
    "attention": (
        ("heft_engine.cpu.amx_attention", "attend"),
        ("heft_engine.model.attention", "attend_rows"),
    ),
    "norms, rotary embeddings": tuple(
        ("heft_engine.cpu.fused_ops:FusedOps", name) for name in ("rms_norm", "rotate")
    ),
}
#: Tokens of the prompts that every model is asked alone and among the others.
SHORT = 48


def seconds(work: Callable[[], object]) -> float:
    """What it takes, in a thread of its own: nobody is slowed by threads that another one left behind."""
    began = time.perf_counter()
    run_in_short_lived_thread(work)
    return time.perf_counter() - began


def questions(options: argparse.Namespace, base: Any, count: int, per_passage: int = 1) -> list[Example]:
    """`count` rows; of `per_passage` that follow one another all get the first one's passage."""
    found = rows.read(options.data, count)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), infer_task(found)))
    first = [found[index // per_passage * per_passage] for index in range(count)]
    return [
        encoder.question(replace(row, passage=other.passage)) for row, other in zip(found, first, strict=True)
    ]


def scored(
    batcher: Batcher, weights: ModelVariant, examples: Sequence[Example], scale: float = 1.0
) -> list[Scores]:
    return batcher.submit(weights, examples, scale=scale).result()


def one_model(options: argparse.Namespace, per_passage: int) -> dict[str, Any]:
    """Rows a second of ours, pyreft's generate and plain transformers, in turn; what the intervention costs."""
    base = rows.base_model(options.model)
    examples = questions(options, base, options.rows, per_passage)
    tokens = sum(map(packed_length, examples))
    weights = run_in_short_lived_thread(lambda: synthetic.merged(rows.packed_model(base), 1))
    lm = weights.lm
    peers = {
        "transformers": run_in_short_lived_thread(lambda: Plain(load(base.path, lm.dtype)).answer),
        "pyreft": run_in_short_lived_thread(lambda: Pyreft(load(base.path, lm.dtype), base.path).answer),
    }
    for peer in peers.values():
        seconds(lambda p=peer: p(examples[:2]))  # type: ignore[misc]
    kept = PREFIX_BYTES if per_passage > 1 else 0
    times: dict[str, list[float]] = {name: [] for name in ("ours", "off", *peers)}
    rates = []
    for turn in range(options.repeat):
        batcher = Batcher(prefix_bytes=kept)
        scored(batcher, weights, examples)
        # Whoever comes second finds warm caches.
        for name in ("ours", "off") if turn % 2 else ("off", "ours"):
            batcher.clear_prefixes(weights.scope)  # no passage has been seen
            scale = 1.0 if name == "ours" else 0.0
            times[name].append(seconds(lambda b=batcher, s=scale: scored(b, weights, examples, s)))  # type: ignore[misc]
        batcher.close()  # its threads would slow the others' (heft_engine.runtime.threads)
        rates.append(run_in_short_lived_thread(lambda: matrix_rate(lm.dtype)))
        for name, peer in peers.items():
            times[name].append(seconds(lambda p=peer: p(examples)))  # type: ignore[misc]
    spent = _spent(weights, examples) if per_passage == 1 else {}
    parameters = sum(p.numel() for layer in lm.layers for p in layer.parameters())
    ours = statistics.median(times["ours"])
    ratios = {name: [t / o for t, o in zip(times[name], times["ours"], strict=True)] for name in peers}
    return {
        "kind": "one-model",
        "rows": len(examples),
        "per_passage": per_passage,
        "tokens": tokens,
        "rows_per_second": {name: len(examples) / statistics.median(found) for name, found in times.items()},
        "ratios": ratios,
        "intervention": [on / off - 1 for on, off in zip(times["ours"], times["off"], strict=True)],
        "share": 2 * parameters * tokens / ours / statistics.median(rates),
        "matrix_rate": statistics.median(rates),
        "spent": spent,
        "threads": torch.get_num_threads(),
    }


def _spent(weights: ModelVariant, examples: Sequence[Example]) -> dict[str, float]:
    """Of a pass's time, in percent; all lanes together."""
    batcher = Batcher(prefix_bytes=0)
    scored(batcher, weights, examples)
    spent = dict.fromkeys(_OPERATIONS, 0.0)
    with ExitStack() as stack:
        for name, functions in _OPERATIONS.items():
            for owner, function in functions:
                with suppress(ModuleNotFoundError):  # heft_engine.cpu can be deleted
                    target = pkgutil.resolve_name(owner)
                    timed = _timed(getattr(target, function), spent, name)
                    stack.enter_context(mock.patch.object(target, function, timed))
        whole = seconds(lambda: scored(batcher, weights, examples))
    lanes_used = min(parallel.job_threads(weights.lm.device), len(examples))
    batcher.close()
    found = {name: 100 * taken / (whole * lanes_used) for name, taken in spent.items()}
    return found | {"the rest (residuals' sums, calls, threads that wait)": 100 - sum(found.values())}


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    lock = threading.Lock()

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            with lock:
                spent[name] += time.perf_counter() - began

    return timed


def many_models(options: argparse.Namespace) -> dict[str, Any]:
    """Requests spread over 1, 10, 100 and 1,000 models of one base, against one model; what they hold; whether every
    answer is the one that its model gives alone."""
    base = rows.base_model(options.model)
    lm = run_in_short_lived_thread(lambda: rows.packed_model(base))
    adapt_rows(lm)
    lm.pack()
    examples = questions(options, base, options.rows)
    merged = run_in_short_lived_thread(lambda: synthetic.merged(lm, 0))
    batcher = Batcher(prefix_bytes=0)
    scored(batcher, merged, examples[:8])
    gc.collect()
    before = psutil.Process().memory_info().rss
    held = run_in_short_lived_thread(
        lambda: [synthetic.unmerged(lm, seed) for seed in range(max(options.models))]
    )
    gc.collect()
    memory = psutil.Process().memory_info().rss - before
    own = sum(weights.adapter.memory_bytes for weights in held)  # type: ignore[union-attr]
    results: dict[str, Any] = {}
    for count in options.models:
        results[str(count)] = {"spread": [], "alone": []}
    for _ in range(options.repeat):
        for count in options.models:
            spread = [held[(index * 7) % count] for index in range(len(examples))]
            results[str(count)]["spread"].append(seconds(lambda s=spread: _each(batcher, s, examples)))  # type: ignore[misc]
            results[str(count)]["alone"].append(seconds(lambda: scored(batcher, merged, examples)))
    together = _each(
        batcher, [held[index % len(held)] for index in range(len(held))], _many(examples, len(held))
    )
    differing = sum(
        scored(batcher, weights, [example])[0] != scores
        for weights, example, scores in zip(held, _many(examples, len(held)), together, strict=True)
    )
    merged_too = _merged_too(batcher, lm, held[: options.compared], examples)
    batcher.close()
    return {
        "kind": "many-models",
        "rows": len(examples),
        "models": results,
        "memory_bytes": memory,
        "adapter_bytes": own,
        "differing": differing,
        "compared": len(held),
        "merged_too": merged_too,
        "threads": torch.get_num_threads(),
    }


def _many(examples: Sequence[Example], count: int) -> list[Example]:
    """Short ones: a thousand models are asked twice."""
    short = [replace(example, prompt=example.prompt[-SHORT:]) for example in examples]
    return [short[index % len(short)] for index in range(count)]


def _each(batcher: Batcher, weights: Sequence[ModelVariant], examples: Sequence[Example]) -> list[Scores]:
    """A request for each row, all at once."""
    futures = [batcher.submit(w, [e]) for w, e in zip(weights, examples, strict=True)]
    return [future.result()[0] for future in futures]


def _merged_too(
    batcher: Batcher, lm: PackedLM, held: Sequence[ModelVariant], examples: Sequence[Example]
) -> dict[str, float]:
    """Of some models, unmerged against merged: the largest and the usual difference of a row's label margin, beside
    the spread of the margins."""
    differences, margins, changed = [], [], 0
    for seed, weights in enumerate(held):
        some = [examples[(seed + i) % len(examples)] for i in range(4)]
        twin = run_in_short_lived_thread(lambda s=seed: synthetic.merged(lm, s))  # type: ignore[misc]
        merged = scored(batcher, twin, some)
        for one, other in zip(scored(batcher, weights, some), merged, strict=True):
            margin = [scores.totals[0] - scores.totals[1] for scores in (one, other)]
            differences.append(abs(margin[0] - margin[1]))
            margins.append(margin[1])
            changed += one.best != other.best
    return {
        "rows": len(differences),
        "largest": max(differences),
        "median": statistics.median(differences),
        "spread": statistics.stdev(margins),
        "answers_changed": changed,
    }
