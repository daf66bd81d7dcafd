"""Messages of requests for text: `/v1/completions` and `/v1/chat/completions`, from the API to a worker and back.

Like `/predict`, such a request holds no state: it travels in the message, and what is written comes back on the Redis
list that the message names, piece by piece where it is streamed. A client that goes away is marked under
`store.messages.predict.cancelled_key`, and its text leaves the worker's batch.

It does NOT know OpenAI's shapes: those are the API's.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from store.messages.predict import Intervention, PredictFault, PredictModel


class SamplingParams(TypedDict):
    """How text is to be written, in the words of OpenAI's API. `top_logprobs` None: no log-probabilities."""

    max_tokens: int | None  #: None: as far as the model's answers go
    temperature: float
    top_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    top_logprobs: int | None
    stop: list[str]


class GenerateMessage(TypedDict):
    """One request for `n` texts to each of `inputs`: rows with a prompt or with messages, as the user wrote them.

    Text number i is the (i % n)th to input i // n. `sent_at` and `deadline` are unix time: when it was sent, and after
    which nobody waits.
    """

    request_id: str
    model: PredictModel
    inputs: list[dict[str, Any]]
    n: int
    wish: SamplingParams
    stream: bool
    intervention: Intervention
    sent_at: float
    deadline: float
    reply_to: str


class TopToken(TypedDict):
    bytes: list[int]
    logprob: float


class GeneratedToken(TypedDict):
    """`offset`: characters of the text before it."""

    bytes: list[int]
    logprob: float
    top: list[TopToken]
    offset: int


class GeneratedPart(TypedDict):
    """The next of text number `index`. `tokens` stays empty unless log-probabilities were asked for."""

    index: int
    text: str
    tokens: list[GeneratedToken]
    finish_reason: Literal["stop", "length"] | None


class GeneratedUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int


class GenerateReply(TypedDict):
    """Pushed as JSON to `reply_to`: any number with a `chunk`; the last has `done` (perhaps with one) or `error`."""

    request_id: str
    chunk: NotRequired[list[GeneratedPart]]
    done: NotRequired[GeneratedUsage]
    error: NotRequired[PredictFault]
