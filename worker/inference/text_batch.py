"""A request for text as the predictor takes it: encoded prompts with their sampling parameters, submitted together."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from heft_engine.data.encoding import CONTEXT_LENGTH_EXCEEDED, Example, context_length_error
from heft_engine.data.rows import parse_row
from heft_engine.data.tool_calls.format import AnswerParser
from heft_engine.errors import RowError
from heft_engine.inference.detokenizer import decode
from heft_engine.inference.grammar import Constraint
from heft_engine.inference.sampling import SamplingParams
from heft_engine.serving.predictor import Predictor
from heft_engine.serving.text_generator import TextDelta, TextRequest
from store.messages.generate import GenerateMessage
from worker.inference.tool_calls import AnswerTools

#: Limit of texts without `max_tokens`, where the model was not trained on longer answers.
DEFAULT_MAX_TOKENS = 256

#: A text's index in its request, and its next delta or the exception that ended it.
IndexedDelta = tuple[int, TextDelta | Exception]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """The texts of one request. They are generated under the ids (request_id, index).

    parsers: of texts that may have tool calls, by index.
    """

    request_id: str
    prompt_tokens: int
    unfinished: set[int]
    parsers: dict[int, AnswerParser]
    deltas: queue.SimpleQueue[IndexedDelta]


def start(predictor: Predictor, message: GenerateMessage) -> TextBatch:
    """Encodes a request's prompts, compiles its constraint and starts to generate its texts. Raises RowError."""
    examples = _prompts(predictor, message)
    max_tokens = [_max_tokens(predictor, example, message) for example in examples]
    request_id, n, intervention = message["request_id"], message["n"], message["intervention"]
    tools = AnswerTools.of(predictor.encoder.chat, message)
    constraint = tools.constraint if tools is not None else _constraint(message)
    echoes = _echoes(predictor, message, examples)
    requests = [
        TextRequest(
            id=(request_id, index),
            prompt=examples[index // n].prompt,
            max_tokens=max_tokens[index // n],
            sampling=_sampling(message, index),
            scale=intervention["scale"] if intervention["enabled"] else 0.0,
            stop=tuple(message["wish"]["stop"]),
            constraint=constraint,
            echo=echoes[index // n],
            echo_only=message["wish"]["max_tokens"] == 0,
            prompt_logprobs=bool(message.get("echo")),
            visible_tokens=tools.visible_tokens if tools is not None else frozenset(),
        )
        for index in range(len(examples) * n)
    ]
    deltas: queue.SimpleQueue[IndexedDelta] = queue.SimpleQueue()
    predictor.generate(requests, lambda text_id, delta: deltas.put((text_id[1], delta)))
    return TextBatch(
        request_id=request_id,
        prompt_tokens=sum(len(example.prompt) for example in examples),
        unfinished=set(range(len(requests))),
        parsers={index: tools.parser() for index in range(len(requests))} if tools is not None else {},
        deltas=deltas,
    )


def _constraint(message: GenerateMessage) -> Constraint | None:
    constraint = message.get("constraint")
    return Constraint(**constraint) if constraint is not None else None


def _prompts(predictor: Predictor, message: GenerateMessage) -> list[Example]:
    """Encodes prompts: with its template for a fine-tuned model, as they are for a base model."""
    if predictor.task.type != "text":
        raise RowError(
            f"this model answers {predictor.task.type} questions: ask it through POST /predict", param="model"
        )
    inputs = message["inputs"]
    examples = []
    for index, fields in enumerate(inputs):
        try:
            if "tokens" in fields:
                examples.append(predictor.encoder.tokens(fields["tokens"]))
                continue
            row = parse_row(fields, need_answer=False)
            if message["model"]["kind"] == "base" and row.prompt is not None:
                examples.append(predictor.encoder.raw(row.prompt))
            else:
                examples.append(predictor.encoder.question(row))
        except RowError as error:
            if len(inputs) == 1:
                raise
            raise RowError(
                f"prompt {index}: {error.message}", param=f"prompt[{index}]", code=error.code
            ) from error
    return examples


def _echoes(predictor: Predictor, message: GenerateMessage, examples: list[Example]) -> list[str | None]:
    """Returns the texts of the prompts as the model reads them: base models read what was sent."""
    if not message.get("echo"):
        return [None] * len(examples)
    is_base = message["model"]["kind"] == "base"
    return [
        fields["prompt"]
        if is_base and "prompt" in fields
        else decode(predictor.encoder.tokenizer, example.prompt)
        for fields, example in zip(message["inputs"], examples, strict=True)
    ]


def _max_tokens(predictor: Predictor, example: Example, message: GenerateMessage) -> int:
    requested, prompt_tokens = message["wish"]["max_tokens"], len(example.prompt)
    max_length = predictor.encoder.max_length
    limit = max_length - prompt_tokens
    if requested == 0 and limit >= 0:
        return 1  # an echo alone: the token is not written
    if limit < 1:
        param = "messages" if "messages" in message["inputs"][0] else "prompt"
        raise context_length_error(prompt_tokens, max_length, param)
    if requested is not None and requested > limit:
        raise RowError(
            f"this model's maximum context length is {max_length} tokens: the prompt has {prompt_tokens}, which leaves "
            f"{limit}",
            param="max_tokens",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    if requested is not None:
        return requested
    return min(limit, max(DEFAULT_MAX_TOKENS, predictor.max_new_tokens))


def _sampling(message: GenerateMessage, index: int) -> SamplingParams:
    """Returns the parameters of one text. The seed is counted up from text to text, so that the n texts differ."""
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
