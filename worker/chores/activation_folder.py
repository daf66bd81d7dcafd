"""Frozen activations that training stages on the same rows share, in a folder of this machine.

The engine keeps them under a budget of bytes (heft_engine.training.activation_store). Here they are forgotten a
day after their last
use, whether or not anything trains: somebody may have deleted the rows since. It does NOT know what is in them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from worker.chores.chore import Chore
from worker.context import Context
from worker.scratch import remove_older_than

_LOOK_SECONDS = 3_600.0
_KEPT_SECONDS = 86_400.0


def folder(context: Context) -> Path:
    return context.shared / "prefills"


def activation_chore(context: Context) -> Chore:
    return Chore(
        name="prefills", seconds=_LOOK_SECONDS, do=partial(remove_older_than, folder(context), _KEPT_SECONDS)
    )
