"""Messages of `/v1/completions` and `/v1/chat/completions`, from the API to a worker and back.

Like `/predict`, such a request holds no state: it travels in the message, and the text comes back on the Redis list
that the message names, in parts where it is streamed. When a client disconnects, the API sets `cancelled_key`, and the
request leaves the worker's batch.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from store.messages.predict import Intervention, PredictFault, PredictModel


class SamplingParams(TypedDict):
    """Sampling parameters by OpenAI's names. `top_logprobs` None: no log-probabilities."""

    max_tokens: int | None  #: None: up to the model's limit
    temperature: float
    top_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    top_logprobs: int | None
    stop: list[str]


class Constraint(TypedDict):
    """A grammar that every text of a request must match.

    source: a JSON schema or a structural tag of xgrammar as JSON text, or a grammar in EBNF.
    param: the request's field that asks for it, for error messages.
    """

    kind: Literal["json_schema", "structural_tag", "ebnf"]
    source: str
    param: str


class ToolUse(TypedDict):
    """Rules for calls of the tools of a request's input.

    choice: auto, the model may call them; required, its answer is a call, of the tool `name` if that is set.
    parallel: an answer may have several calls.
    """

    choice: Literal["auto", "required"]
    name: str | None
    parallel: bool


class GenerateMessage(TypedDict):
    """A request for `n` texts of each of `inputs`: rows with a prompt or with messages, as the user sent them, or
    {"tokens": the prompt's token ids}.

    echo: each text begins with its prompt, whose tokens have log-probabilities if `top_logprobs` is set. With it
    `max_tokens` may be 0.

    With `tool_use` the texts' tool calls are parsed; without, a call is text like any other.
    Text i is choice i % n of input i // n. `sent_at` and `deadline` are unix times; after the deadline nobody waits for
    the text.
    """

    request_id: str
    model: PredictModel
    inputs: list[dict[str, Any]]
    n: int
    wish: SamplingParams
    stream: bool
    echo: NotRequired[bool]
    constraint: NotRequired[Constraint | None]
    tool_use: NotRequired[ToolUse | None]
    intervention: Intervention
    sent_at: float
    deadline: float
    reply_to: str


class TopToken(TypedDict):
    bytes: list[int]
    logprob: float


class GeneratedToken(TypedDict):
    """A token with its log-probability, null for a prompt's first one. `offset`: characters of the text before it."""

    bytes: list[int]
    logprob: float | None
    top: list[TopToken]
    offset: int


class GeneratedToolCall(TypedDict):
    """A complete tool call, the text's call number `index`. `arguments`: a JSON object, as text."""

    index: int
    id: str
    name: str
    arguments: str


class GeneratedPart(TypedDict):
    """The next part of text `index`. `tokens` is empty unless the request has `top_logprobs`."""

    index: int
    text: str
    tool_calls: NotRequired[list[GeneratedToolCall]]
    tokens: list[GeneratedToken]
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class GeneratedUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class GenerateReply(TypedDict):
    """A reply, pushed as JSON to `reply_to`: the last one has `done` or `error`; each but an error may have a
    `chunk`.
    """

    request_id: str
    chunk: NotRequired[list[GeneratedPart]]
    done: NotRequired[GeneratedUsage]
    error: NotRequired[PredictFault]
