"""Evicts deleted models from an inference worker's memory, within half a minute.

While the database is away nothing is evicted: loaded models go on answering.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from store import models
from store.db.session import transaction
from worker.chores.chore import Chore
from worker.context import Context

_PERIOD_SECONDS = 30.0


class LoadedModels(Protocol):
    """The models in an inference worker's memory."""

    def fine_tuned(self) -> Sequence[str]:
        """Returns the ids of the fine-tuned models that are loaded."""

    def evict(self, model_id: str) -> None:
        """Evicts a model after the requests under way. Ignores unknown ids."""


def eviction_chore(context: Context, loaded: LoadedModels) -> Chore:
    return Chore(
        name="evict deleted models", seconds=_PERIOD_SECONDS, run=lambda: evict_deleted(context, loaded)
    )


def evict_deleted(context: Context, loaded: LoadedModels) -> None:
    """Raises Unavailable."""
    model_ids = loaded.fine_tuned()
    if not model_ids:
        return
    with transaction(context.sessions) as session:
        existing = models.present(session, model_ids=model_ids)
    for model_id in model_ids:
        if model_id not in existing:
            loaded.evict(model_id)
