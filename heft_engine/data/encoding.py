"""The one written contract for encoding: how a row becomes prompt tokens, answer tokens and intervened positions.

Training, evaluation and serving all use this module and nothing else. It does NOT know models or batches.

Prompt
    yes_no, choice: the task's template, filled. A line that holds only `{passage}` or `{choices}` goes away when the
    row has none. One question mark ends the question, whether the row had one or not.
    prompt rows: the template (`{prompt}`); a prompt that does not end in white space gets one newline.
    message rows: the tokenizer's chat template up to and including the header of the assistant's turn; a tokenizer
    without one gets PLAIN_CHAT.
    A BOS token stands first if the tokenizer puts one there itself. Chat templates bring their own.
Answer
    yes_no: " yes" or " no". choice: a space and the choice. Nothing follows, so that only the label is scored.
    prompt rows: the completion as written, then EOS. message rows: the turn's content, then the token that ends a
    turn (EOS).
    Each supervised assistant turn (weight 1) is an example of its own, whose prompt is the conversation before it:
    in training as in serving.
Boundary
    Prompt and answer are tokenised apart, so the boundary never moves with the words on either side. The answer is
    tokenised after a fixed anchor, so that a leading space means the same to BPE and to SentencePiece.
Supervised tokens
    The answer's, all of them, and no others. The loss of an optimiser step is the sum over all its supervised tokens
    divided by their number, however the step was cut into micro-batches.
Truncation
    Only the passage is shortened, at its end, until prompt and longest answer fit into `max_length`. What does not
    fit even without a passage is refused.
Intervened positions
    `f<n>` and `l<m>` are the first n and last m prompt tokens, each clamped to half the prompt's length as in pyreft.
"""

from __future__ import annotations

import hashlib
import json
import string
from dataclasses import dataclass, replace
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from heft_engine.config.train import DEFAULT_MAX_LENGTH
from heft_engine.data.chat_rows import Message
from heft_engine.data.metrics import check_numbers
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' + '\n' }}{% endif %}"
)
_ANCHOR = "x:"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row in tokens. `answers[i]` belongs to `labels[i]`; `gold` is the index of the right one, if known."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    gold: int | None
    truncated: bool = False

    def supervised(self) -> Example:
        """The example with its right answer alone: what training packs. Raises ValueError without one."""
        if self.gold is None:
            raise ValueError("a row without an answer can't be trained on")
        return replace(self, answers=(self.answers[self.gold],), labels=(self.labels[self.gold],), gold=0)

    @property
    def supervised_tokens(self) -> int:
        return len(self.answers[self.gold]) if self.gold is not None else 0


def intervened_positions(prompt_length: int, first: int, last: int) -> list[int]:
    """The prompt positions that `f<first>+l<last>` means: pyreft's clamp, each part at most half of the prompt."""
    first, last = min(prompt_length // 2, first), min(prompt_length // 2, last)
    return [*range(first), *range(prompt_length - last, prompt_length)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides the tokens: vocabulary, merges and normaliser, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256("\0".join([core, special, str(tokenizer.chat_template)]).encode()).hexdigest()


class Encoder:
    """Turns rows into examples for one tokenizer, one task and one length."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int = DEFAULT_MAX_LENGTH
    ) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        probe = cast(list[int], tokenizer("a")["input_ids"])
        bos = tokenizer.bos_token_id
        self._bos: list[int] = [bos] if bos is not None and probe[:1] == [bos] else []
        if task.type == "text" and tokenizer.eos_token_id is None:
            raise ConfigError(
                "this model's tokenizer has no EOS token, which a text task needs", param="model"
            )
        self._fixed = self._answers(task.labels) if task.labels else None

    def encode(self, row: Row) -> list[Example]:
        """The examples of one training row: one, or one for each supervised turn of a conversation.

        Raises RowError when the row does not fit the task or its metrics, or does not fit into `max_length` without
        its passage.
        """
        if "final_number" in self.task.metrics:
            check_numbers(row)
        if row.kind == "messages":
            assert row.messages is not None
            turns = [i for i, turn in enumerate(row.messages) if turn.role == "assistant" and turn.weight]
            return [self._conversation(row.messages[:i], row.messages[i].content) for i in turns]
        return [self.question(row)]

    def question(self, row: Row) -> Example:
        """One row as a question: its prompt and, for labels, every possible answer. Raises RowError like `encode`."""
        if row.kind == "messages":
            assert row.messages is not None
            return self._conversation(row.messages, None)
        if row.kind == "prompt":
            return self._completion(row)
        if self.task.type != row.kind:
            raise RowError(f"this is a {row.kind} row, the task is {self.task.type}", param="question")
        return self._labelled(row)

    def raw(self, text: str) -> Example:
        """Bare text to go on from, without the task's template. Raises RowError like `encode`."""
        return self._free(self._bos + self.text(text), None, "prompt")

    def text(self, text: str) -> list[int]:
        """Tokens of free text, without BOS or EOS."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def continuation(self, text: str) -> list[int]:
        """Tokens of a text that follows other text."""
        anchor = self.text(_ANCHOR)
        whole = self.text(_ANCHOR + text)
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else self.text(text)

    def _answers(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        answers = tuple(tuple(self.continuation(" " + label)) for label in labels)
        if len(set(answers)) != len(answers) or not all(answers):
            raise RowError(
                f"this tokenizer can't tell these labels apart: {', '.join(labels)}", param="choices"
            )
        return answers

    def _labelled(self, row: Row) -> Example:
        labels = row.choices if row.kind == "choice" and row.choices else self.task.labels
        if labels is None:
            raise RowError("this row has no choices, and the task has no labels", param="choices")
        fixed = self._fixed if labels == self.task.labels else None
        answers = fixed or self._answers(labels)
        prompt, truncated = self._prompt(row, labels, self.max_length - max(map(len, answers)))
        if row.answer is not None and row.answer not in labels:
            raise RowError(f"answer {row.answer!r} is none of the labels", param="answer")
        gold = labels.index(row.answer) if row.answer is not None else None
        return Example(prompt=prompt, answers=answers, labels=labels, gold=gold, truncated=truncated)

    def _prompt(self, row: Row, labels: tuple[str, ...], budget: int) -> tuple[tuple[int, ...], bool]:
        passage = row.passage or ""
        ids = self._render(row, passage, labels)
        truncated = len(ids) > budget
        while len(ids) > budget:
            if not passage:
                raise RowError(
                    f"question and answer alone are {len(ids) + self.max_length - budget} tokens long, "
                    f"more than max_length {self.max_length}",
                    param="question",
                )
            offsets = self.tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            keep = max(0, len(offsets) - (len(ids) - budget))
            shorter = passage[: offsets[keep - 1][1]] if keep else ""
            passage = shorter if len(shorter) < len(passage) else passage[:-1]
            ids = self._render(row, passage, labels)
        return tuple(ids), truncated

    def _render(self, row: Row, passage: str, labels: tuple[str, ...]) -> list[int]:
        choices = "\n".join(f"- {label}" for label in labels) if self.task.type == "choice" else ""
        absent = {name for name, value in (("{passage}", passage), ("{choices}", choices)) if not value}
        lines = self.task.template.split("\n")
        template = "\n".join(line for line in lines if line.strip() not in absent)
        question = (row.question or "").strip().rstrip("?" + string.whitespace) + "?"
        fields = {"passage": passage, "choices": choices, "question": question}
        return self._bos + self.text(_fill(template, fields))

    def _completion(self, row: Row) -> Example:
        if self.task.type != "text":
            raise RowError(f"this row has a prompt, the task is {self.task.type}", param="prompt")
        text = _fill(self.task.template, {"prompt": row.prompt or ""})
        prompt = self._bos + self.text(text if text[-1:].isspace() else text + "\n")
        return self._free(prompt, row.answer, "prompt")

    def _conversation(self, turns: tuple[Message, ...], answer: str | None) -> Example:
        if self.task.type != "text":
            raise RowError(f"this row has messages, the task is {self.task.type}", param="messages")
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                chat_template=self.tokenizer.chat_template or PLAIN_CHAT,
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            # Many templates know no system turn, or insist on user and assistant in turns.
            raise RowError(
                f"this model's chat template refuses the conversation: {error}", param="messages"
            ) from error
        return self._free(self.text(cast(str, text)), answer, "messages")

    def _free(self, prompt: list[int], answer: str | None, param: str) -> Example:
        eos = cast(int, self.tokenizer.eos_token_id)
        answers = ((*self.continuation(answer), eos),) if answer is not None else ()
        length = len(prompt) + sum(map(len, answers))
        if length > self.max_length:
            raise RowError(
                f"this row is {length} tokens long, more than max_length {self.max_length}", param=param
            )
        labels = (answer,) if answer is not None else ()
        return Example(prompt=tuple(prompt), answers=answers, labels=labels, gold=0 if answers else None)


def _fill(template: str, fields: dict[str, str]) -> str:
    """Replaces {name} in one pass, so that braces inside a value stay what they are."""
    parts, rest = [], template
    while rest:
        found = min(
            ((rest.find("{" + name + "}"), name) for name in fields if "{" + name + "}" in rest), default=None
        )
        if found is None:
            parts.append(rest)
            break
        index, name = found
        parts += [rest[:index], fields[name]]
        rest = rest[index + len(name) + 2 :]
    return "".join(parts)
