"""Answers from a bundle: base + adapters merged, interventions in place, checked against the bundle's probe rows.

Template, labels, lengths and tokenizer come from the bundle and from nowhere else. It does NOT know queues or owners.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heft_engine.bundle.format import Bundle, check_tokenizer, read_bundle
from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.errors import BundleError
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.partition import TOKEN_BUDGET
from heft_engine.inference.scoring import Scores
from heft_engine.inference.scoring_pass import ScoringRow, score_rows
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer, resolve
from heft_engine.model.model_files import inspect, weights_hash
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import micro_batches
from heft_engine.runtime.devices import choose_device, choose_dtype
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher, Cancelled
from heft_engine.serving.text_generator import Listener, TextDelta, TextGenerator, TextRequest

#: What keys and values of texts that are being written may hold, unless told otherwise.
KEY_VALUE_BYTES = 1024**3
#: Between two looks whether an answer is still wanted.
_LOOK_SECONDS = 0.25
_CALLS = itertools.count()


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
    """A model in memory that answers rows. Safe to call from several threads: whoever asks at the same time shares
    forward passes.

    `weights` may be a merged model's own or an unmerged one's on a shared base. `batcher` and `writer` may serve other
    predictors too; by default each has its own.
    """

    def __init__(
        self,
        variant: ModelVariant,
        encoder: Encoder,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        batcher: Batcher | None = None,
        generator: TextGenerator | None = None,
        key_value_bytes: int = KEY_VALUE_BYTES,
        prefix_bytes: int = 0,
    ) -> None:
        self.variant = variant
        self.encoder = encoder
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        #: Texts that are being written, for all who ask.
        self.generator = generator or TextGenerator(
            variant.lm, encoder.tokenizer, budget_bytes=key_value_bytes
        )
        if batcher is None:
            batcher = Batcher(prefix_bytes=prefix_bytes)
            weakref.finalize(self, batcher.close)
        self.batcher = batcher

    @property
    def lm(self) -> PackedLM:
        return self.variant.lm

    @property
    def task(self) -> Task:
        return self.encoder.task

    @property
    def memory_bytes(self) -> int:
        """What its parameters hold, and the texts that are being written."""
        parameters = list(self.lm.model.parameters())
        for placed in self.lm.interventions:
            parameters += placed.intervention.parameters()
        return sum(p.numel() * p.element_size() for p in parameters) + self.generator.memory_bytes

    def predict(
        self,
        rows: Sequence[Row],
        *,
        enabled: bool = True,
        scale: float = 1.0,
        owner: Hashable = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> list[Prediction]:
        """Answers in the rows' order. `enabled` False or `scale` 0 leaves stage 2 out; h + scale·(Φ(h) − h) otherwise.

        `owner`: whose prompts' beginnings may be kept for one another. `is_wanted` is asked now and then; when it says
        no, the rest is left. Raises RowError for a row that does not fit the task or the length, Cancelled when it is
        not wanted any more.
        """
        examples = [self.encoder.question(row) for row in rows]
        scale = scale if enabled else 0.0
        if self.task.type == "text":
            return self._write(examples, scale, is_wanted)
        future = self.batcher.submit(self.variant, examples, scale=scale, owner=owner)
        scores = _wanted(future, is_wanted)
        return [self._labelled(example, one) for example, one in zip(examples, scores, strict=True)]

    def _labelled(self, example: Example, scores: Scores) -> Prediction:
        probabilities = dict(zip(example.labels, scores.probabilities_at(self.temperature), strict=True))
        answer = example.labels[scores.best]
        return Prediction(
            answer=answer,
            probability=probabilities[answer],
            label_probabilities=probabilities,
            prompt_tokens=len(example.prompt),
            completion_tokens=0,
        )

    def generate(self, requests: Sequence[TextRequest], listener: Listener) -> None:
        """Has texts written, beside the others; `listener` hears their pieces, on the passes' thread.

        Raises RowError when one would never have room.
        """
        adapter = self.variant.adapter
        self.generator.submit([replace(request, adapter=adapter) for request in requests], listener)
        self.batcher.schedule(self.generator)

    def cancel(self, request_id: Hashable) -> None:
        """Lets a text go; its listener hears no more."""
        self.generator.cancel(request_id)
        self.batcher.schedule(self.generator)

    def _write(
        self, examples: Sequence[Example], scale: float, is_wanted: Callable[[], bool]
    ) -> list[Prediction]:
        texts = [_Text(example) for example in examples]
        call, requests = next(_CALLS), []  # several calls write on one batch
        for index, text in enumerate(texts):
            tokens = min(self.max_new_tokens, self.encoder.max_length - len(text.example.prompt))
            if tokens < 1:
                text.is_whole.set()
            else:
                prompt = text.example.prompt
                name = (call, index)
                requests.append(TextRequest(id=name, prompt=prompt, max_tokens=tokens, scale=scale))
        self.generate(requests, lambda name, piece: texts[name[1]].hear(piece))
        try:
            for text in texts:
                while not text.is_whole.wait(_LOOK_SECONDS):
                    if not is_wanted():
                        raise Cancelled
        finally:
            for index, text in enumerate(texts):
                if not text.is_whole.is_set():
                    self.cancel((call, index))
        return [text.prediction() for text in texts]


def _wanted(future: Future[list[Scores]], is_wanted: Callable[[], bool]) -> list[Scores]:
    """What comes of it, as long as it is wanted. Raises Cancelled."""
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            if future.done():
                return future.result()  # just now, or the pass's own fault
            if not is_wanted():
                future.cancel()
                raise Cancelled from None


class _Text:
    """One text as it is heard."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.is_whole = threading.Event()
        self._pieces: list[str] = []
        self._tokens = 0
        self._fault: Exception | None = None

    def hear(self, piece: TextDelta | Exception) -> None:
        if isinstance(piece, Exception):
            self._fault = piece
        else:
            self._pieces.append(piece.text)
            self._tokens = piece.written
        if isinstance(piece, Exception) or piece.finish is not None:
            self.is_whole.set()

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
    prefix_bytes: int = 0,
    key_value_bytes: int = KEY_VALUE_BYTES,
) -> Predictor:
    """A bundle's model, ready to answer.

    `prefix_bytes`: what beginnings of prompts may hold that are kept for whoever repeats them; scores then agree to
    rounding, and without to the bit. Raises BundleError when the bundle is damaged, when the base is another one, or
    when the probe rows don't get the scores that training saw; ModelError when the base can't be had.
    """
    bundle = read_bundle(Path(bundle_dir))
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)

    def checked() -> PackedLM:
        lm = assemble(
            bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths, device=device
        )
        lm.pack()
        check_probe(bundle, ModelVariant(lm=lm, interventions=tuple(lm.interventions)))
        return lm

    lm = run_in_short_lived_thread(checked)
    encoder = Encoder(tokenizer, Task.from_json(bundle.info.task), bundle.info.max_length)
    return Predictor(
        ModelVariant(lm=lm, interventions=tuple(lm.interventions), scope="merged"),
        encoder,
        bundle.info.max_new_tokens,
        temperature=bundle.info.temperature,
        prefix_bytes=prefix_bytes,
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
    prefix_bytes: int = 0,
    key_value_bytes: int = KEY_VALUE_BYTES,
) -> Predictor:
    """A base model as it is, asked with a task's default template. Raises ModelError."""
    base = run_in_short_lived_thread(
        lambda: resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    )
    where = device or choose_device()
    dtype = choose_dtype("auto", where)
    lm = run_in_short_lived_thread(
        lambda: PackedLM(load_model(base, dtype=dtype, device=where, attention=IMPLEMENTATION))
    )
    run_in_short_lived_thread(lm.pack)
    length = resolve_max_length(None, inspect(base.path).max_position_embeddings)
    encoder = Encoder(load_tokenizer(base.path), Task.resolve(TaskSettings(), task), length)
    variant = ModelVariant(lm=lm, scope="base")
    return Predictor(
        variant, encoder, max_new_tokens=64, prefix_bytes=prefix_bytes, key_value_bytes=key_value_bytes
    )


def assemble(
    bundle: Bundle,
    *,
    model_dir: Path | None = None,
    cache_dir: Path | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    base: BaseModel | None = None,
) -> PackedLM:
    """The merged model with its interventions, in the dtype it was trained in unless told otherwise. `base`: the
    bundle's, where it has been looked up."""
    if base is None:
        base = base_of(bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    where = device or choose_device()
    model = load_model(
        base, dtype=dtype or getattr(torch, bundle.info.dtype), device=where, attention=IMPLEMENTATION
    )
    lm = PackedLM(model)
    for adapter in bundle.adapters:
        adapter.merge_into(lm.model)
    for stored in bundle.interventions:
        if not 0 <= stored.layer < lm.n_layers:
            raise BundleError(f"the bundle's intervention at layer {stored.layer} is for a deeper model")
        lm.interventions.add(stored.restore(lm.hidden_size))
    return lm


def base_of(
    bundle: Bundle, *, model_dir: Path | None, cache_dir: Path | None, allow_paths: bool
) -> BaseModel:
    """The very base that a bundle was trained on. Raises BundleError when its weights differ, ModelError."""
    record = bundle.info.base_model
    reference = record.reference
    if record.source == "hub" and record.revision:
        reference = f"{reference.partition('@')[0]}@{record.revision}"  # the commit, where a branch was named
    base = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
    if weights_hash(base.path) != record.weights_sha256:
        raise BundleError(f"{record.reference} is not the base this model was trained on: its weights differ")
    return base


def check_probe(bundle: Bundle, variant: ModelVariant) -> None:
    """Raises BundleError when a probe row's score lies outside the tolerance stated in the bundle."""
    rows = [ScoringRow(example=example, adapter=variant.adapter) for example in bundle.probe.examples]
    found = [scores for part in _passes(rows) for scores in score_rows(variant.lm, part)]
    for index, (scores, expected) in enumerate(zip(found, bundle.probe.scores, strict=True)):
        worst = max(abs(a - b) for a, b in zip(scores.totals, expected, strict=True))
        if not worst <= bundle.info.probe_tolerance:
            raise BundleError(
                f"probe row {index} scores {worst:.3g} away from what training saw (tolerance "
                f"{bundle.info.probe_tolerance:.3g}): this is not the model that was trained"
            )


def _passes(rows: Sequence[ScoringRow]) -> Iterator[Sequence[ScoringRow]]:
    start = 0
    for part in micro_batches([row.example for row in rows], TOKEN_BUDGET):
        yield rows[start : start + len(part)]
        start += len(part)
