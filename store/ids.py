"""Ids: random, safe in URLs, with a prefix that names the kind of object."""

from __future__ import annotations

import secrets
import string
from functools import partial

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24  #: 62^24 ids: unique, and too many to guess
_SHORT_LENGTH = 8


def _new(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


new_file_id = partial(_new, "file-")
new_job_id = partial(_new, "ftjob-")
new_study_id = partial(_new, "study_")
new_study_event_id = partial(_new, "studyevent_")
new_event_id = partial(_new, "ftevent-")
new_checkpoint_id = partial(_new, "ftckpt-")
new_completion_id = partial(_new, "cmpl-")
new_chat_completion_id = partial(_new, "chatcmpl-")


def model_id(*, base: str, owner_id: str, suffix: str | None, job_id: str) -> str:
    """Returns `ft:<base>:<owner>:<suffix>:<short id>`, the id of a job's model.

    It depends on the job alone: its checkpoints' models have ids before the job has a result.
    """
    return f"ft:{base}:{owner_id}:{suffix or ''}:{job_id[-_SHORT_LENGTH:]}"


def is_fine_tuned(model: str) -> bool:
    """Returns True for the form of a fine-tuned model's id or of a checkpoint's."""
    return model.startswith("ft:")


def base_of(model: str) -> str:
    """Returns the base in a fine-tuned model's id; a base itself."""
    return model.split(":")[1] if is_fine_tuned(model) else model


def checkpoint_model_id(final: str, label: str) -> str:
    """Returns `ft:…:ckpt-lora` or `ft:…:ckpt-step-20`, the id of a checkpoint's model."""
    return f"{final}:ckpt-{label}"
