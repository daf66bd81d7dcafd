"""Training and question rows: what a JSON object must hold, and the one record the rest of the engine sees.

It does NOT know tokens, prompts or models: that is `heft_engine.encoding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["yes_no", "choice", "prompt", "messages"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation. `weight` 0 leaves an assistant's turn unsupervised, as in OpenAI's API."""

    role: str
    content: str
    weight: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row, checked. Which fields are set depends on `kind`; `answer` is None where a question is asked.

    yes_no: question, passage (may be None), answer "yes" or "no".
    choice: question, passage, choices, answer (one of choices).
    prompt: prompt, answer (the completion).
    messages: messages; the assistant's turns with weight 1 are the answers.
    """

    kind: RowKind
    question: str | None = None
    passage: str | None = None
    choices: tuple[str, ...] | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None
