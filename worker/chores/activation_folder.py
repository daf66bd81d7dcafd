"""The machine's folder of cached activations, which training stages on the same rows share.

The engine keeps it within a budget of bytes (heft_engine.training.activation_store). This chore deletes entries a day
after their last use, whether or not anything trains: the rows may have been deleted since.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from worker.chores.chore import Chore
from worker.context import Context
from worker.scratch import remove_older_than

_PERIOD_SECONDS = 3_600.0
_MAX_AGE_SECONDS = 86_400.0


def activation_folder(context: Context) -> Path:
    return context.shared / "prefills"


def activation_chore(context: Context) -> Chore:
    expire = partial(remove_older_than, activation_folder(context), _MAX_AGE_SECONDS)
    return Chore(name="expire activations", seconds=_PERIOD_SECONDS, run=expire)
