"""Ids: random, safe in URLs, with a prefix that names the kind of object."""

from __future__ import annotations

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24  #: 62^24 ids: unique, and too many to guess
_SHORT_LENGTH = 8


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
    """Returns `ft:<base>:<owner>:<suffix>:<short id>`, the id of a job's model.

    It depends on the job alone: its checkpoints' models have ids before the job has a result.
    """
    return f"ft:{base}:{owner_id}:{suffix or ''}:{job_id[-_SHORT_LENGTH:]}"


def checkpoint_model_id(final: str, label: str) -> str:
    """Returns `ft:…:ckpt-lora`, the id of a checkpoint's model."""
    return f"{final}:ckpt-{label}"
