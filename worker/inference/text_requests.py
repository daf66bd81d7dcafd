"""A request for text as its model takes it: encoded, with its sampling, submitted to those it is writing already.

It does NOT know where pieces go.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

from heft_engine.data.encoding import Example
from heft_engine.data.rows import parse_row
from heft_engine.errors import RowError
from heft_engine.inference.sampling import SamplingParams
from heft_engine.serving.predictor import Predictor
from heft_engine.serving.text_generator import TextDelta, TextRequest
from store.messages.generate import GenerateMessage

#: How far an answer goes that nobody set an end to, where the model was not trained on longer ones.
USUAL_TOKENS = 256

#: A text's number, and what was heard of it.
Heard = tuple[int, TextDelta | Exception]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of one request, under way. They are written with ids (request, number)."""

    request_id: str
    prompt_tokens: int
    count: int
    heard: queue.SimpleQueue[Heard]


def begin(predictor: Predictor, message: GenerateMessage) -> Texts:
    """Encodes and submits a request's texts. Raises RowError."""
    examples = _prompts(predictor, message)
    heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    tokens = [_max_tokens(predictor, example, message) for example in examples]
    request_id, count = message["request_id"], len(examples) * message["n"]
    intervention = message["intervention"]
    requests = [
        TextRequest(
            id=(request_id, index),
            prompt=examples[index // message["n"]].prompt,
            max_tokens=tokens[index // message["n"]],
            sampling=_sampling(message, index),
            scale=intervention["scale"] if intervention["enabled"] else 0.0,
            stop=tuple(message["wish"]["stop"]),
        )
        for index in range(count)
    ]
    predictor.generate(requests, lambda name, piece: heard.put((int(str(name[1])), piece)))
    return Texts(
        request_id=request_id,
        prompt_tokens=sum(len(example.prompt) for example in examples),
        count=count,
        heard=heard,
    )


def _prompts(predictor: Predictor, message: GenerateMessage) -> list[Example]:
    """A fine-tuned model is asked as it was trained, through its template; a base model goes on from the bare text."""
    if predictor.task.type != "text":
        raise RowError(
            f"this model answers {predictor.task.type} questions: ask it through POST /predict", param="model"
        )
    several = len(message["inputs"]) > 1
    examples = []
    for index, given in enumerate(message["inputs"]):
        try:
            row = parse_row(given, need_answer=False)
            raw = message["model"]["kind"] == "base" and row.prompt is not None
            examples.append(
                predictor.encoder.raw(row.prompt or "") if raw else predictor.encoder.question(row)
            )
        except RowError as fault:
            if not several:
                raise
            raise RowError(f"prompt {index}: {fault.message}", param=f"prompt[{index}]") from fault
    return examples


def _max_tokens(predictor: Predictor, example: Example, message: GenerateMessage) -> int:
    asked, prompt, most = message["wish"]["max_tokens"], len(example.prompt), predictor.encoder.max_length
    room = most - prompt
    if room < 1 or (asked is not None and asked > room):
        raise RowError(
            f"the prompt has {prompt} tokens and this model takes {most} in all, which leaves {max(room, 0)}",
            param="max_tokens"
            if room > 0
            else "messages"
            if "messages" in message["inputs"][0]
            else "prompt",
        )
    return min(room, max(USUAL_TOKENS, predictor.max_new_tokens)) if asked is None else asked


def _sampling(message: GenerateMessage, index: int) -> SamplingParams:
    """Several texts of one seed differ, and the first is the one that comes alone."""
    wish = message["wish"]
    seed = wish["seed"]
    return SamplingParams(
        temperature=wish["temperature"],
        top_p=wish["top_p"],
        seed=None if seed is None else (seed + index) % 2**63,
        presence_penalty=wish["presence_penalty"],
        frequency_penalty=wish["frequency_penalty"],
        logit_bias=tuple((int(token), bias) for token, bias in wish["logit_bias"].items()),
        top_logprobs=wish["top_logprobs"],
    )
