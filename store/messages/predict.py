"""Messages of `/predict`, from the API to a worker and back.

Such a request holds no state: it travels in a Celery message (`PredictMessage`), and the answer comes back on the Redis
list that the message names (`PredictReply`).
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

REPLY_SECONDS = 60  #: the expiry of a list of replies, after its last reply
CANCELLED_SECONDS = 600  #: the expiry of `cancelled_key`; no message waits longer


def cancelled_key(request_id: str) -> str:
    """Returns the Redis key that exists once a request is cancelled."""
    return f"heft:cancelled:{request_id}"


class PredictModel(TypedDict):
    """The model that answers: a `base` model by its id, or a `final` or `checkpoint` bundle by its storage key.

    `owner` is the caller: workers share no cached prefixes between owners.
    """

    id: str
    owner: str
    kind: Literal["base", "final", "checkpoint"]
    base_model: str
    storage_key: str | None  #: None for a base model
    manifest: dict[str, str] | None  #: {file: sha256}


class Intervention(TypedDict):
    enabled: bool
    scale: float


class PredictMessage(TypedDict):
    """A request to `/predict`. `inputs` are rows as the user sent them.

    `sent_at` and `deadline` are unix times; after the deadline nobody waits for the reply.
    """

    request_id: str
    model: PredictModel
    inputs: list[dict[str, Any]]
    intervention: Intervention
    sent_at: float
    deadline: float
    reply_to: str


class PredictedRow(TypedDict):
    answer: str
    probability: float | None
    label_probabilities: dict[str, float] | None
    prompt_tokens: int
    completion_tokens: int


class PredictedRows(TypedDict):
    data: list[PredictedRow]


class PredictFault(TypedDict):
    """A refusal: the HTTP status and the error object of the API's response."""

    status: int
    code: str
    message: str
    param: str | None


class PredictReply(TypedDict):
    """A reply, pushed as JSON to `reply_to` (RPUSH; read it with BLPOP): either `ok` or `error`."""

    request_id: str
    ok: NotRequired[PredictedRows]
    error: NotRequired[PredictFault]
