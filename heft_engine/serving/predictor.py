"""A model in memory that answers rows: `load` for a bundle's model, `load_base` for a base model as it is.

Template, labels, lengths and tokenizer come from the bundle and from nowhere else.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from heft_engine.bundle.assemble import assemble
from heft_engine.bundle.format import Bundle, check_tokenizer, read_bundle
from heft_engine.bundle.probe import check_probe
from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.inference.model_variant import ModelVariant
from heft_engine.inference.scoring import Scores
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_max_length
from heft_engine.model.base_models import BaseModel, load_model, load_tokenizer, resolve
from heft_engine.model.model_files import inspect
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.precision import dtype_for
from heft_engine.runtime.devices import choose_device
from heft_engine.runtime.threads import run_in_short_lived_thread
from heft_engine.serving.batcher import Batcher, wait
from heft_engine.serving.text_generator import OnDelta, TextDelta, TextGenerator, TextRequest

#: Default budget of the key/value cache for generated text.
KEY_VALUE_BYTES = 1024**3
#: Longest answer of a base model, in tokens; a bundle brings its own.
_BASE_MAX_NEW_TOKENS = 64
_CALL_IDS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. Probabilities are softmax(float32 log-probabilities of the labels / calibration temperature); None
    for generated text."""

    answer: str
    probability: float | None
    label_probabilities: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int


class Predictor:
    """A model with its encoder. Safe to call from several threads: concurrent calls share forward passes.

    `variant` is merged, or an adapter on a shared base model. Predictors may share a `batcher` and a `generator`; by
    default each has its own.
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
        self.generator = generator or TextGenerator(
            variant.lm, encoder.tokenizer, budget_bytes=key_value_bytes
        )
        if batcher is None:
            batcher = Batcher(prefix_bytes=prefix_bytes)
            weakref.finalize(self, batcher.close)
        self.batcher = batcher

    @classmethod
    def of_bundle(
        cls, bundle: Bundle, variant: ModelVariant, tokenizer: PreTrainedTokenizerBase, **shared: Any
    ) -> Predictor:
        """Returns a bundle's predictor. `shared` are keyword arguments of the constructor."""
        info = bundle.info
        vocab_size = variant.lm.config.vocab_size
        encoder = Encoder(tokenizer, Task.from_json(info.task), info.max_length, vocab_size=vocab_size)
        return cls(variant, encoder, info.max_new_tokens, temperature=info.temperature, **shared)

    @classmethod
    def of_base(
        cls,
        model: BaseModel,
        task: TaskType,
        variant: ModelVariant,
        tokenizer: PreTrainedTokenizerBase,
        **shared: Any,
    ) -> Predictor:
        """Returns a base model's predictor, with the default template of `task`."""
        info = inspect(model.path)
        max_length = resolve_max_length(None, info.max_position_embeddings)
        resolved = Task.resolve(TaskSettings(), task)
        encoder = Encoder(tokenizer, resolved, max_length, vocab_size=info.vocab_size)
        return cls(variant, encoder, _BASE_MAX_NEW_TOKENS, **shared)

    @property
    def lm(self) -> PackedLM:
        return self.variant.lm

    @property
    def task(self) -> Task:
        return self.encoder.task

    @property
    def memory_bytes(self) -> int:
        """Bytes of its parameters and of its key/value cache."""
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
        is_active: Callable[[], bool] = lambda: True,
    ) -> list[Prediction]:
        """Returns the rows' answers, in their order.

        Interventions act as h + scale · (Φ(h) − h); `enabled=False` and `scale=0` leave them out. Cached prefixes are
        shared between calls of the same `owner` alone. `is_active` is polled while the call waits. Raises RowError for
        a row that fits neither the task nor the length, CancelledError once `is_active` returns False.
        """
        examples = [self.encoder.question(row) for row in rows]
        scale = scale if enabled else 0.0
        if self.encoder.task.type == "text":
            return self._complete(examples, scale, is_active)
        scores = self.batcher.score(self.variant, examples, scale=scale, owner=owner, is_active=is_active)
        return [self._label(example, row) for example, row in zip(examples, scores, strict=True)]

    def generate(self, requests: Sequence[TextRequest], on_delta: OnDelta) -> None:
        """Starts to generate texts, batched with those of other calls; `on_delta` is called on the batcher's thread.

        Raises RowError when a request does not fit the key/value cache.
        """
        adapter = self.variant.adapter
        self.generator.submit([replace(request, adapter=adapter) for request in requests], on_delta)
        self.batcher.schedule(self.generator)

    def cancel(self, request_id: Hashable) -> None:
        """Ends a text early, without a further delta."""
        self.generator.cancel(request_id)
        self.batcher.schedule(self.generator)

    def _label(self, example: Example, scores: Scores) -> Prediction:
        probabilities = dict(zip(example.labels, scores.probabilities_at(self.temperature), strict=True))
        answer = example.labels[scores.best]
        return Prediction(
            answer=answer,
            probability=probabilities[answer],
            label_probabilities=probabilities,
            prompt_tokens=len(example.prompt),
            completion_tokens=0,
        )

    def _complete(
        self, examples: Sequence[Example], scale: float, is_active: Callable[[], bool]
    ) -> list[Prediction]:
        texts = [_Text(example) for example in examples]
        call_id = next(_CALL_IDS)
        requests = []
        for index, example in enumerate(examples):
            max_tokens = min(self.max_new_tokens, self.encoder.max_length - len(example.prompt))
            if max_tokens < 1:
                texts[index].finish()
                continue
            requests.append(
                TextRequest(id=(call_id, index), prompt=example.prompt, max_tokens=max_tokens, scale=scale)
            )
        self.generate(requests, lambda request_id, delta: texts[request_id[1]].on_delta(delta))
        try:
            return [wait(text.prediction, is_active) for text in texts]
        except BaseException:
            for request in requests:
                self.cancel(request.id)
            raise


class _Text:
    """Joins a text's deltas into a prediction."""

    def __init__(self, example: Example) -> None:
        self.prediction: Future[Prediction] = Future()
        self._prompt_tokens = len(example.prompt)
        self._completion_tokens = 0
        self._parts: list[str] = []

    def on_delta(self, delta: TextDelta | Exception) -> None:
        if isinstance(delta, Exception):
            with suppress(InvalidStateError):  # the caller has cancelled
                self.prediction.set_exception(delta)
            return
        self._parts.append(delta.text)
        self._completion_tokens = delta.completion_tokens
        if delta.finish_reason is not None:
            self.finish()

    def finish(self) -> None:
        prediction = Prediction(
            answer="".join(self._parts),
            probability=None,
            label_probabilities=None,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )
        with suppress(InvalidStateError):
            self.prediction.set_result(prediction)


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
    """Loads a bundle's model.

    `prefix_bytes` is the budget of the prefix cache; with one, scores of a repeated prompt agree to rounding instead of
    to the bit. Raises BundleError when the bundle is damaged, when it is for another base model, or when its probe rows
    don't get the scores that training recorded; ModelError when the base model can't be loaded.
    """
    bundle = read_bundle(Path(bundle_dir))
    tokenizer = load_tokenizer(bundle.path / "tokenizer")
    check_tokenizer(bundle.info, tokenizer)

    def load_merged() -> ModelVariant:
        lm = assemble(
            bundle, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths, device=device
        )
        lm.pack()
        variant = ModelVariant.of_merged(lm, scope="merged")
        check_probe(bundle, variant)
        return variant

    variant = run_in_short_lived_thread(load_merged)
    return Predictor.of_bundle(
        bundle, variant, tokenizer, prefix_bytes=prefix_bytes, key_value_bytes=key_value_bytes
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
    """Loads a base model as it is, with a task's default template. Raises ModelError."""
    device = choose_device(device)

    def load_plain() -> tuple[BaseModel, PackedLM]:
        model = resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=allow_paths)
        dtype = dtype_for(model, "auto", device)
        lm = PackedLM(load_model(model, dtype=dtype, device=device, attention=IMPLEMENTATION))
        lm.pack()
        return model, lm

    model, lm = run_in_short_lived_thread(load_plain)
    return Predictor.of_base(
        model,
        task,
        ModelVariant(lm=lm, scope="base"),
        load_tokenizer(model.path),
        prefix_bytes=prefix_bytes,
        key_value_bytes=key_value_bytes,
    )
