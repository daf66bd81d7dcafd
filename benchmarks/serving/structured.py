"""JSON answers under schemas: do they validate, and what do they cost the texts beside them."""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonschema import Draft202012Validator

from benchmarks.serving.schemas import SCHEMAS
from heft_engine.inference import decode_batch
from heft_engine.inference.decode_batch import DecodeBatch, DecodeRequest
from heft_engine.inference.grammar import Constraint, GrammarCompiler, mask_tokens
from heft_engine.inference.greedy import eos_token_ids
from heft_engine.inference.sampling import SamplingParams
from heft_engine.json_schema.grammar_schema import grammar_schema
from heft_engine.serving.predictor import Predictor, load_base
from heft_engine.serving.text_generator import TextDelta, TextRequest

#: Results of `answers`.
RESULT = Path(__file__).parent / "results" / "json-answers.json"
#: Suffices for every schema.
_MAX_TOKENS = 250
_FREE_TOKENS = 24
#: Texts of a step, half of them under a grammar in the mixed batch.
_BATCH = 32
_WARM_UP_STEPS = 5


def answers(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the numbers of valid answers, alone and beside as many free texts, added to those of earlier calls."""
    predictor = load_base(options.model, task="text", key_value_bytes=4 * 1024**3)
    earlier = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = {}
    for name in ("alone", "mixed"):
        before = earlier.get(name, {"answers": 0, "valid": 0, "invalid": [], "tokens": 0})
        counts = _answers(predictor, before["answers"], options.answers, is_mixed=name == "mixed")
        result[name] = {key: before[key] + counts[key] for key in before}
    return result


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Times decoding steps of a batch of free texts and of one in which half are under grammars, alternately."""
    predictor = load_base(options.model, task="text", key_value_bytes=4 * 1024**3)
    return _steps(predictor, options.steps)


def _constraint(schema: Any) -> Constraint:
    return Constraint(kind="json_schema", source=json.dumps(grammar_schema(schema)))


def _answers(predictor: Predictor, first: int, count: int, *, is_mixed: bool) -> dict[str, Any]:
    names = list(SCHEMAS)
    questions = {index: names[index % len(names)] for index in range(first, first + count)}
    requests = []
    for index, question in questions.items():
        prompt = predictor.encoder.raw(f"Question: {question}\nAnswer in JSON: ").prompt
        sampling = SamplingParams(temperature=1.0, seed=index)
        json_answer = TextRequest(
            id=index,
            prompt=prompt,
            max_tokens=_MAX_TOKENS,
            sampling=sampling,
            constraint=_constraint(SCHEMAS[question]),
        )
        requests.append(json_answer)
        if is_mixed:
            free = TextRequest(id=f"free {index}", prompt=prompt, max_tokens=_FREE_TOKENS, sampling=sampling)
            requests.append(free)
    texts, tokens = _generate(predictor, requests)
    invalid = []
    for index, question in questions.items():
        try:
            Draft202012Validator(
                SCHEMAS[question], format_checker=Draft202012Validator.FORMAT_CHECKER
            ).validate(json.loads(texts[index]))
        except Exception as error:  # noqa: BLE001 - any of them makes the answer invalid, and is shown
            invalid.append({"question": question, "answer": texts[index], "error": str(error)[:200]})
    return {"answers": count, "valid": count - len(invalid), "invalid": invalid, "tokens": tokens}


def _generate(predictor: Predictor, requests: list[TextRequest]) -> tuple[dict[Any, str], int]:
    """Returns the texts by id, and the number of tokens in all of them."""
    texts: dict[Any, str] = {request.id: "" for request in requests}
    tokens: dict[Any, int] = {}
    failures: list[Exception] = []
    ended = threading.Semaphore(0)

    def on_delta(request_id: Any, delta: TextDelta | Exception) -> None:
        if isinstance(delta, Exception):
            failures.append(delta)
            ended.release()
            return
        texts[request_id] += delta.text
        tokens[request_id] = delta.completion_tokens
        if delta.finish_reason is not None:
            ended.release()

    predictor.generate(requests, on_delta)
    for _ in requests:
        ended.acquire()
    if failures:
        raise failures[0]
    return texts, sum(tokens.values())


def _steps(predictor: Predictor, steps: int) -> dict[str, Any]:
    lm, tokenizer = predictor.lm, predictor.encoder.tokenizer
    compiler = GrammarCompiler(
        tokenizer, vocab_size=lm.vocab_size, eos_tokens=eos_token_ids(lm, predictor.encoder.chat)
    )
    schemas = list(SCHEMAS.values())
    prompt = predictor.encoder.raw("Question: what do you see?\nAnswer: ").prompt
    batches = {}
    for name in ("free", "mixed"):
        batch = batches[name] = DecodeBatch(lm, budget_bytes=2**31)
        requests = []
        for index in range(_BATCH):
            # Arrays that do not end while steps are timed.
            schema = schemas[index % len(schemas)]
            endless = {"type": "array", "items": schema, "minItems": 1_000} | {
                "$defs": schema.get("$defs", {})
            }
            grammar = compiler.compile(_constraint(endless)) if name == "mixed" and index % 2 else None
            requests.append(
                DecodeRequest(id=index, prompt=prompt, max_tokens=2 * steps + 50, grammar=grammar)
            )
        batch.prefill(requests)
    seconds: dict[str, list[float]] = {"free": [], "mixed": []}
    masking: list[float] = []

    def timed(*arguments: Any) -> list[int]:
        # The processor's time, which other programs do not lengthen.
        began = time.thread_time()
        dead_ends = mask_tokens(*arguments)
        masking.append(time.thread_time() - began)
        return dead_ends

    with patch.object(decode_batch, "mask_tokens", timed):
        for step in range(steps + _WARM_UP_STEPS):
            for name in ("free", "mixed") if step % 2 else ("mixed", "free"):
                began = time.perf_counter()
                batches[name].decode()
                seconds[name].append(time.perf_counter() - began)
    free, mixed = (seconds[name][_WARM_UP_STEPS:] for name in ("free", "mixed"))
    return {
        "batch": _BATCH,
        "steps": steps,
        "step_seconds": {"free": statistics.median(free), "mixed": statistics.median(mixed)},
        "ratio": statistics.median(a / b for a, b in zip(free, mixed, strict=True)),
        "mask_seconds": statistics.median(second for second in masking if second > 1e-5),
    }
