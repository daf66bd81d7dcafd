"""Answers from a bundle: base + adapters merged, interventions in place, checked against the bundle's probe rows.

Template, labels, lengths and tokenizer come from the bundle and from nowhere else. It does NOT know queues or owners.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heft_engine import lora
from heft_engine.attention import IMPLEMENTATION
from heft_engine.base_models import load_model, load_tokenizer, resolve
from heft_engine.bundle import Bundle, check_tokenizer, read_bundle
from heft_engine.config import TaskSettings, TaskType
from heft_engine.devices import choose_device, choose_dtype
from heft_engine.encoding import Encoder, Example, Task
from heft_engine.errors import BundleError
from heft_engine.generation import generate
from heft_engine.model import PackedLM
from heft_engine.model_files import inspect, weights_hash
from heft_engine.resolve import resolve_max_length
from heft_engine.rows import Row
from heft_engine.scoring import score


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. Probabilities are softmax over the labels' float32 log-probabilities; None for generated text."""

    answer: str
    probability: float | None
    label_probabilities: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int


class Predictor:
    """A model in memory that answers rows. Safe to call from several threads; one forward pass at a time."""

    def __init__(self, lm: PackedLM, encoder: Encoder, max_new_tokens: int) -> None:
        self.lm = lm
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self._lock = threading.Lock()

    @property
    def task(self) -> Task:
        return self.encoder.task

    @property
    def memory_bytes(self) -> int:
        """What its parameters hold."""
        parts = [self.lm.model, *(site.intervention for site in self.lm.sites)]
        return sum(p.numel() * p.element_size() for part in parts for p in part.parameters())

    def predict(self, rows: Sequence[Row], *, enabled: bool = True, scale: float = 1.0) -> list[Prediction]:
        """Answers in the rows' order. `enabled` False or `scale` 0 leaves stage 2 out; h + scale·(Φ(h) − h) otherwise.

        Raises RowError for a row that does not fit the task or the length.
        """
        examples = [self.encoder.question(row) for row in rows]
        scale = scale if enabled else 0.0
        with self._lock:
            if self.task.type == "text":
                return [self._write(example, scale) for example in examples]
            scores = score(self.lm, examples, scale=scale)
        predictions = []
        for example, one in zip(examples, scores, strict=True):
            probabilities = dict(zip(example.labels, one.probabilities, strict=True))
            answer = example.labels[one.best]
            prediction = Prediction(
                answer=answer,
                probability=probabilities[answer],
                label_probabilities=probabilities,
                prompt_tokens=len(example.prompt),
                completion_tokens=0,
            )
            predictions.append(prediction)
        return predictions

    def _write(self, example: Example, scale: float) -> Prediction:
        eos = self.encoder.tokenizer.eos_token_id
        budget = min(self.max_new_tokens, self.encoder.max_length - len(example.prompt))
        tokens = generate(self.lm, example, eos=eos, max_new_tokens=budget, scale=scale)
        return Prediction(
            answer=str(self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)),
            probability=None,
            label_probabilities=None,
            prompt_tokens=len(example.prompt),
            completion_tokens=len(tokens),
        )


def load(
    bundle_dir: Path,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
) -> Predictor:
    """A bundle's model, ready to answer. Raises BundleError when it is damaged, when the base is another one, or
    when the probe rows don't get the scores that training saw; ModelError when the base can't be had."""
    bundle = read_bundle(Path(bundle_dir))
    lm = assemble(bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths, device=device)
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    check_probe(bundle, lm)
    encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    return Predictor(lm, encoder, bundle.info.max_new_tokens)


def load_base(
    reference: str,
    *,
    task: TaskType = "yes_no",
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
) -> Predictor:
    """A base model as it is, asked with a task's default template. Raises ModelError."""
    base = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    where = device or choose_device()
    model = load_model(base, dtype=choose_dtype("auto", where), device=where, attention=IMPLEMENTATION)
    length = resolve_max_length(None, inspect(base.path).max_position_embeddings)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), task), length)
    return Predictor(PackedLM(model), encoder, max_new_tokens=64)


def assemble(
    bundle: Bundle,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> PackedLM:
    """The merged model with its interventions, in the dtype it was trained in unless told otherwise."""
    record = bundle.info.base_model
    reference = record.reference
    if record.source == "hub" and record.revision:
        reference = f"{reference.partition('@')[0]}@{record.revision}"  # the commit, where a branch was named
    base = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    if weights_hash(base.path) != record.weights_sha256:
        raise BundleError(f"{record.reference} is not the base this model was trained on: its weights differ")
    where = device or choose_device()
    model = load_model(
        base, dtype=dtype or getattr(torch, bundle.info.dtype), device=where, attention=IMPLEMENTATION
    )
    lm = PackedLM(model)
    for adapter in bundle.adapters:
        lora.merge(lm.model, adapter)
    for stored in bundle.interventions:
        if not 0 <= stored.layer < lm.n_layers:
            raise BundleError(f"the bundle's intervention at layer {stored.layer} is for a deeper model")
        lm.sites.add(stored.site(lm.hidden_size))
    return lm


def check_probe(bundle: Bundle, lm: PackedLM) -> None:
    """Raises BundleError when a probe row's score lies outside the tolerance stated in the bundle."""
    for index, (scores, expected) in enumerate(
        zip(score(lm, bundle.probe.examples), bundle.probe.scores, strict=True)
    ):
        worst = max(abs(a - b) for a, b in zip(scores.totals, expected, strict=True))
        if not worst <= bundle.info.probe_tolerance:
            raise BundleError(
                f"probe row {index} scores {worst:.3g} away from what training saw (tolerance "
                f"{bundle.info.probe_tolerance:.3g}): this is not the model that was trained"
            )
