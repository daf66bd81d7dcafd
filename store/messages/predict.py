"""Messages of `/predict`, from the API to a worker and back.

Such a request holds no state: it travels in a Celery message (`PredictMessage`), and the answer comes back on the Redis
list that the message names (`PredictReply`).
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

#: Seconds that a list of replies outlives its last reply when the API process that reads it is gone.
REPLY_SECONDS = 60
#: Seconds that a cancelled request is remembered; no message waits longer.
CANCELLED_SECONDS = 600


def cancelled_key(request_id: str) -> str:
    """The Redis key that exists once nobody waits for this request any more."""
    return f"heft:cancelled:{request_id}"


class PredictModel(TypedDict):
    """Which weights answer: a `base` model by its id, or a `final` or `checkpoint` bundle by its key in
    storage. `owner` is who asks: what a worker keeps of one owner's prompts serves no other."""

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
    """One request. `inputs` are rows as the user wrote them; `sent_at` and `deadline` are unix time: when it was
    sent, and after which nobody waits."""

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
    """An answer that is a refusal: the HTTP status and the error object that the API shall give."""

    status: int
    code: str
    message: str
    param: str | None


class PredictReply(TypedDict):
    """Pushed as JSON to `reply_to` (RPUSH; read it with BLPOP). Exactly one of `ok` and `error` is there."""

    request_id: str
    ok: NotRequired[PredictedRows]
    error: NotRequired[PredictFault]
