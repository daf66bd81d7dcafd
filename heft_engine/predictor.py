"""Answers from a bundle: base + adapters merged, interventions in place, checked against the bundle's probe rows.

Template, labels, lengths and tokenizer come from the bundle and from nowhere else. It does NOT know queues or owners.
"""

from __future__ import annotations

import itertools
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
from heft_engine.model import PackedLM
from heft_engine.model_files import inspect, weights_hash
from heft_engine.resolve import resolve_max_length
from heft_engine.rows import Row
from heft_engine.scoring import score
from heft_engine.serving.writing import Piece, TextWriter, WriteRequest

#: What keys and values of texts that are being written may hold, unless told otherwise.
KEY_VALUE_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. Probabilities are softmax over the labels' float32 log-probabilities, divided by the temperature
    that the model was calibrated with; None for generated text."""

    answer: str
    probability: float | None
    label_probabilities: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int


class Predictor:
    """A model in memory that answers rows. Safe to call from several threads; one forward pass at a time."""

    def __init__(
        self,
        lm: PackedLM,
        encoder: Encoder,
        max_new_tokens: int,
        *,
        key_value_bytes: int = KEY_VALUE_BYTES,
        temperature: float = 1.0,
    ) -> None:
        self.lm = lm
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        #: Texts that are being written, for all who ask: `predict` and whoever submits to it and calls `turn`.
        self.writer = TextWriter(lm, encoder.tokenizer, budget_bytes=key_value_bytes)
        self._lock = threading.Lock()
        self._calls = itertools.count()

    @property
    def task(self) -> Task:
        return self.encoder.task

    @property
    def memory_bytes(self) -> int:
        """What its parameters hold, and the texts that are being written."""
        parts = [self.lm.model, *(site.intervention for site in self.lm.sites)]
        own = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        return own + self.writer.memory_bytes

    def turn(self) -> None:
        """One pass for all texts that are being written."""
        with self._lock:
            self.writer.turn()

    def predict(self, rows: Sequence[Row], *, enabled: bool = True, scale: float = 1.0) -> list[Prediction]:
        """Answers in the rows' order. `enabled` False or `scale` 0 leaves stage 2 out; h + scale·(Φ(h) − h) otherwise.

        Raises RowError for a row that does not fit the task or the length.
        """
        examples = [self.encoder.question(row) for row in rows]
        scale = scale if enabled else 0.0
        if self.task.type == "text":
            return self._write(examples, scale)
        with self._lock:
            scores = score(self.lm, examples, scale=scale)
        predictions = []
        for example, one in zip(examples, scores, strict=True):
            probabilities = dict(zip(example.labels, one.probabilities_at(self.temperature), strict=True))
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

    def _write(self, examples: Sequence[Example], scale: float) -> list[Prediction]:
        texts = [_Text(example) for example in examples]
        call, requests = next(self._calls), []  # several calls write on one batch
        for index, text in enumerate(texts):
            tokens = min(self.max_new_tokens, self.encoder.max_length - len(text.example.prompt))
            if tokens < 1:
                text.is_whole = True
            else:
                prompt = text.example.prompt
                name = (call, index)
                requests.append(WriteRequest(id=name, prompt=prompt, max_tokens=tokens, scale=scale))
        self.writer.submit(requests, lambda name, piece: texts[name[1]].hear(piece))
        try:
            while not all(text.is_whole for text in texts):
                self.turn()
        finally:
            for index, text in enumerate(texts):
                if not text.is_whole:
                    self.writer.cancel((call, index))
        return [text.prediction() for text in texts]


class _Text:
    """One text as it is heard."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.is_whole = False
        self._pieces: list[str] = []
        self._tokens = 0
        self._fault: Exception | None = None

    def hear(self, piece: Piece | Exception) -> None:
        if isinstance(piece, Exception):
            self._fault = piece
        else:
            self._pieces.append(piece.text)
            self._tokens = piece.written
        self.is_whole = isinstance(piece, Exception) or piece.finish is not None

    def prediction(self) -> Prediction:
        """Raises what went wrong."""
        if self._fault is not None:
            raise self._fault
        return Prediction(
            answer="".join(self._pieces),
            probability=None,
            label_probabilities=None,
            prompt_tokens=len(self.example.prompt),
            completion_tokens=self._tokens,
        )


def load(
    bundle_dir: Path,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    key_value_bytes: int = KEY_VALUE_BYTES,
) -> Predictor:
    """A bundle's model, ready to answer. Raises BundleError when it is damaged, when the base is another one, or
    when the probe rows don't get the scores that training saw; ModelError when the base can't be had."""
    bundle = read_bundle(Path(bundle_dir))
    lm = assemble(bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths, device=device)
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)
    check_probe(bundle, lm)
    encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    return Predictor(
        lm,
        encoder,
        bundle.info.max_new_tokens,
        temperature=bundle.info.temperature,
        key_value_bytes=key_value_bytes,
    )


def load_base(
    reference: str,
    *,
    task: TaskType = "yes_no",
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    key_value_bytes: int = KEY_VALUE_BYTES,
) -> Predictor:
    """A base model as it is, asked with a task's default template. Raises ModelError."""
    base = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    where = device or choose_device()
    model = load_model(base, dtype=choose_dtype("auto", where), device=where, attention=IMPLEMENTATION)
    length = resolve_max_length(None, inspect(base.path).max_position_embeddings)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), task), length)
    return Predictor(PackedLM(model), encoder, max_new_tokens=64, key_value_bytes=key_value_bytes)


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
