"""The library's parts: one model on distinct rows and on repeated passages, and many models on one base."""

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
from heft_engine.serving.row_adapters import enable_row_adapters

PREFIX_BYTES = 512 * 1024**2
#: The functions of each kind of operation in a forward pass.
_OPERATIONS = {
    "matrix products (with AMX, the norms and gated activations around them too)": (
        ("torch.nn:Linear", "forward"),
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
#: Tokens of the prompts that every model answers alone and in mixed batches.
SHORT = 48


def seconds(work: Callable[[], object]) -> float:
    """Measures work in a thread of its own, so that threads of earlier work do not slow it."""
    started_at = time.perf_counter()
    run_in_short_lived_thread(work)
    return time.perf_counter() - started_at


def questions(options: argparse.Namespace, base: Any, count: int, per_passage: int = 1) -> list[Example]:
    """Returns `count` rows, of which each `per_passage` consecutive ones have the same passage."""
    read = rows.read(options.data, count)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), infer_task(read)))
    passages = [read[index // per_passage * per_passage].passage for index in range(count)]
    return [
        encoder.question(replace(row, passage=passage)) for row, passage in zip(read, passages, strict=True)
    ]


def score(
    batcher: Batcher, variant: ModelVariant, examples: Sequence[Example], scale: float = 1.0
) -> list[Scores]:
    return batcher.submit(variant, examples, scale=scale).result()


def one_model(options: argparse.Namespace, per_passage: int) -> dict[str, Any]:
    """Measures rows per second of HEFT, with and without its intervention, pyreft and transformers, alternately."""
    base = rows.base_model(options.model)
    examples = questions(options, base, options.rows, per_passage)
    tokens = sum(map(packed_length, examples))
    variant = run_in_short_lived_thread(lambda: synthetic.merged(rows.packed_model(base), 1))
    lm = variant.lm
    baselines = {
        "transformers": run_in_short_lived_thread(lambda: Plain(load(base.path, lm.dtype)).answer),
        "pyreft": run_in_short_lived_thread(lambda: Pyreft(load(base.path, lm.dtype), base.path).answer),
    }
    for baseline in baselines.values():
        seconds(lambda b=baseline: b(examples[:2]))  # type: ignore[misc]
    prefix_bytes = PREFIX_BYTES if per_passage > 1 else 0
    times: dict[str, list[float]] = {name: [] for name in ("ours", "off", *baselines)}
    rates = []
    for turn in range(options.repeat):
        batcher = Batcher(prefix_bytes=prefix_bytes)
        score(batcher, variant, examples)
        # Alternating order, because the second finds warm caches.
        for name in ("ours", "off") if turn % 2 else ("off", "ours"):
            batcher.clear_prefixes(variant.scope)
            scale = 1.0 if name == "ours" else 0.0
            times[name].append(seconds(lambda b=batcher, s=scale: score(b, variant, examples, s)))  # type: ignore[misc]
        batcher.close()  # its threads would slow the baselines (heft_engine.runtime.threads)
        rates.append(run_in_short_lived_thread(lambda: matrix_rate(lm.dtype)))
        for name, baseline in baselines.items():
            times[name].append(seconds(lambda b=baseline: b(examples)))  # type: ignore[misc]
    spent = _time_shares(variant, examples) if per_passage == 1 else {}
    parameters = sum(p.numel() for layer in lm.layers for p in layer.parameters())
    ours = statistics.median(times["ours"])
    ratios = {name: [t / o for t, o in zip(times[name], times["ours"], strict=True)] for name in baselines}
    return {
        "kind": "one-model",
        "rows": len(examples),
        "per_passage": per_passage,
        "tokens": tokens,
        "rows_per_second": {name: len(examples) / statistics.median(runs) for name, runs in times.items()},
        "ratios": ratios,
        "intervention": [on / off - 1 for on, off in zip(times["ours"], times["off"], strict=True)],
        "share": 2 * parameters * tokens / ours / statistics.median(rates),
        "matrix_rate": statistics.median(rates),
        "spent": spent,
        "threads": torch.get_num_threads(),
    }


def _time_shares(variant: ModelVariant, examples: Sequence[Example]) -> dict[str, float]:
    """Returns percentages of the time of a forward pass by kind of operation, over all its threads."""
    batcher = Batcher(prefix_bytes=0)
    score(batcher, variant, examples)
    spent = dict.fromkeys(_OPERATIONS, 0.0)
    with ExitStack() as stack:
        for name, functions in _OPERATIONS.items():
            for owner, function in functions:
                with suppress(ModuleNotFoundError):  # heft_engine.cpu can be deleted
                    target = pkgutil.resolve_name(owner)
                    timed = _timed(getattr(target, function), spent, name)
                    stack.enter_context(mock.patch.object(target, function, timed))
        total = seconds(lambda: score(batcher, variant, examples))
    threads = min(parallel.job_threads(variant.lm.device), len(examples))
    batcher.close()
    shares = {name: 100 * time_spent / (total * threads) for name, time_spent in spent.items()}
    return shares | {"the rest (residual sums, calls, waiting threads)": 100 - sum(shares.values())}


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    lock, depth = threading.Lock(), threading.local()

    def timed(*args: Any, **options: Any) -> Any:
        if getattr(depth, "is_inside", False):  # one kind of operation calls another of the same kind
            return function(*args, **options)
        depth.is_inside = True
        started_at = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            depth.is_inside = False
            with lock:
                spent[name] += time.perf_counter() - started_at

    return timed


def many_models(options: argparse.Namespace) -> dict[str, Any]:
    """Measures requests to 1, 10, 100 and 1,000 models of one base against requests to one model.

    Also measures the models' memory, and counts answers that differ from those that a model gives alone.
    """
    base = rows.base_model(options.model)
    lm = run_in_short_lived_thread(lambda: rows.packed_model(base))
    enable_row_adapters(lm)
    lm.pack()
    examples = questions(options, base, options.rows)
    merged = run_in_short_lived_thread(lambda: synthetic.merged(lm, 0))
    batcher = Batcher(prefix_bytes=0)
    score(batcher, merged, examples[:8])
    gc.collect()
    before = psutil.Process().memory_info().rss
    variants = run_in_short_lived_thread(
        lambda: [synthetic.unmerged(lm, seed) for seed in range(max(options.models))]
    )
    gc.collect()
    memory = psutil.Process().memory_info().rss - before
    adapter_bytes = sum(variant.adapter.memory_bytes for variant in variants)  # type: ignore[union-attr]
    results: dict[str, Any] = {}
    for count in options.models:
        results[str(count)] = {"spread": [], "alone": []}
    for _ in range(options.repeat):
        for count in options.models:
            spread = [variants[(index * 7) % count] for index in range(len(examples))]
            results[str(count)]["spread"].append(seconds(lambda s=spread: _score_each(batcher, s, examples)))  # type: ignore[misc]
            results[str(count)]["alone"].append(seconds(lambda: score(batcher, merged, examples)))
    short = _short_examples(examples, len(variants))
    mixed = _score_each(batcher, variants, short)
    differing = sum(
        score(batcher, variant, [example])[0] != scores
        for variant, example, scores in zip(variants, short, mixed, strict=True)
    )
    merged_too = _compare_merged(batcher, lm, variants[: options.compared], examples)
    batcher.close()
    return {
        "kind": "many-models",
        "rows": len(examples),
        "models": results,
        "memory_bytes": memory,
        "adapter_bytes": adapter_bytes,
        "differing": differing,
        "compared": len(variants),
        "merged_too": merged_too,
        "threads": torch.get_num_threads(),
    }


def _short_examples(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns `count` examples with short prompts."""
    short = [replace(example, prompt=example.prompt[-SHORT:]) for example in examples]
    return [short[index % len(short)] for index in range(count)]


def _score_each(
    batcher: Batcher, variants: Sequence[ModelVariant], examples: Sequence[Example]
) -> list[Scores]:
    """Submits a request for each row at once."""
    futures = [batcher.submit(variant, [e]) for variant, e in zip(variants, examples, strict=True)]
    return [future.result()[0] for future in futures]


def _compare_merged(
    batcher: Batcher, lm: PackedLM, variants: Sequence[ModelVariant], examples: Sequence[Example]
) -> dict[str, float]:
    """Compares unmerged models with merged copies: largest and median difference of a row's label margin, and the
    standard deviation of the margins."""
    differences, margins, changed = [], [], 0
    for seed, variant in enumerate(variants):
        compared = [examples[(seed + i) % len(examples)] for i in range(4)]
        copy = run_in_short_lived_thread(lambda s=seed: synthetic.merged(lm, s))  # type: ignore[misc]
        merged_scores = score(batcher, copy, compared)
        for unmerged, merged in zip(score(batcher, variant, compared), merged_scores, strict=True):
            margin = [scores.totals[0] - scores.totals[1] for scores in (unmerged, merged)]
            differences.append(abs(margin[0] - margin[1]))
            margins.append(margin[1])
            changed += unmerged.best != merged.best
    return {
        "rows": len(differences),
        "largest": max(differences),
        "median": statistics.median(differences),
        "spread": statistics.stdev(margins),
        "answers_changed": changed,
    }
