"""The inference side forgets models that were deleted: what it holds of them goes within half a minute.

A database that is away changes nothing: what is held goes on answering. It does NOT know how models are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from store import models
from store.db.session import transaction
from worker.chores.chore import Chore
from worker.context import Context

SECONDS = 30.0


class Holder(Protocol):
    """Models in memory."""

    def fine_tuned(self) -> Sequence[str]:
        """The ids of the fine-tuned models that are held."""

    def forget(self, model_id: str) -> None:
        """Lets go of a model, after the answers that are under way. Unknown ids are no fault."""


def forgetting(context: Context, holder: Holder) -> list[Chore]:
    """The chore of an inference worker."""
    return [Chore(name="forgetting", seconds=SECONDS, do=lambda: forget_deleted(context, holder))]


def forget_deleted(context: Context, holder: Holder) -> None:
    """Raises Unavailable."""
    held = holder.fine_tuned()
    if not held:
        return
    with transaction(context.sessions) as session:
        present = models.present(session, model_ids=held)
    for model_id in held:
        if model_id not in present:
            holder.forget(model_id)
