"""Names for things: random, safe in URLs, and telling what they name by their prefix."""

from __future__ import annotations

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24  #: 62^24: no two are ever equal, and none can be guessed
_SHORT = 8


def _new(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def new_file_id() -> str:
    return _new("file-")


def new_job_id() -> str:
    return _new("ftjob-")


def new_study_id() -> str:
    return _new("study_")


def new_study_event_id() -> str:
    return _new("studyevent_")


def new_event_id() -> str:
    return _new("ftevent-")


def new_checkpoint_id() -> str:
    return _new("ftckpt-")


def new_completion_id() -> str:
    return _new("cmpl-")


def new_chat_completion_id() -> str:
    return _new("chatcmpl-")


def model_id(*, base: str, owner_id: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<owner>:<suffix>:<short id>`. A job's model has one name, known before it exists, so that
    the models of its checkpoints can be named after it.
    """
    return f"ft:{base}:{owner_id}:{suffix or ''}:{job_id[-_SHORT:]}"


def checkpoint_model_id(final: str, label: str) -> str:
    """`ft:…:ckpt-lora`: the model of a checkpoint, named after the job's."""
    return f"{final}:ckpt-{label}"
