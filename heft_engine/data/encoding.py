"""Encoding of rows as prompt tokens, answer tokens and intervened positions, for training, evaluation and serving.

Prompt
    yes_no, choice: the filled template of the task. A line with only `{passage}` or `{choices}` is dropped if the row
    has none. The question ends in exactly one question mark.
    prompt rows: the filled template (`{prompt}`); one newline is appended unless it ends in white space.
    message rows: the tokenizer's chat template (heft_engine.data.chat_template), up to and including the header of the
    assistant turn.
    BOS is prepended if the tokenizer does so itself. Chat templates contain their own.
Answer
    yes_no: " yes" or " no". choice: a space and the choice. No EOS, so that only the label is scored; but where one
    label's tokens begin with another's, EOS ends every label of the row: P(" 10") = P(" 1") P("0" | " 1") would never
    exceed P(" 1").
    prompt rows: the completion, then EOS. message rows: the turn as the chat template renders it, tool calls included,
    then the template's token for the end of a turn.
    Each supervised assistant turn (weight 1) is an example of its own with the turns before it as its prompt, as in
    serving.
Boundary
    Prompt and answer are tokenised separately, so that the boundary does not depend on the words around it. The answer
    is tokenised after a fixed anchor, so that BPE and SentencePiece treat its leading space alike.
Supervised tokens
    All tokens of the answer and no others. The loss of an optimiser step is the sum over its supervised tokens divided
    by their number, however the step is divided into micro-batches.
Truncation
    The passage is truncated at its end until prompt and longest answer fit into `max_length`. A row that does not fit
    without its passage is refused.
Intervened positions
    `f<n>` and `l<m>` are the first n and last m prompt tokens, each at most half of the prompt as in pyreft.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

from transformers import PreTrainedTokenizerBase

from heft_engine.config.train import DEFAULT_MAX_LENGTH
from heft_engine.data.chat_rows import Message
from heft_engine.data.chat_template import BREAK, ChatTemplate
from heft_engine.data.metrics import check_numbers
from heft_engine.data.rows import Row
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError

#: The code of a prompt that is too long, at OpenAI.
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_ANCHOR = "x:"


@dataclass(frozen=True, kw_only=True)
class Example:
    """An encoded row. `answers[i]` are the tokens of `labels[i]`; `gold` is the index of the right label, if known."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...]
    gold: int | None
    truncated: bool = False

    def supervised(self) -> Example:
        """Returns the example with its right answer only, for training. Raises ValueError without an answer."""
        if self.gold is None:
            raise ValueError("training needs rows with an answer")
        return replace(self, answers=(self.answers[self.gold],), labels=(self.labels[self.gold],), gold=0)

    @property
    def supervised_tokens(self) -> int:
        return len(self.answers[self.gold]) if self.gold is not None else 0


def intervened_positions(prompt_length: int, first: int, last: int) -> list[int]:
    """Returns the prompt positions of `f<first>+l<last>`; each part is at most half of the prompt, as in pyreft."""
    first, last = min(prompt_length // 2, first), min(prompt_length // 2, last)
    return [*range(first), *range(prompt_length - last, prompt_length)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides tokens: vocabulary, merges, normaliser, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    chat = tokenizer.chat_template
    if isinstance(chat, dict):  # several named templates, whose order changes when they are saved
        chat = dict(sorted(chat.items()))
    return hashlib.sha256("\0".join([core, special, str(chat)]).encode()).hexdigest()


class Encoder:
    """Encodes rows for one tokenizer, task and maximum length."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_length: int = DEFAULT_MAX_LENGTH,
        *,
        vocab_size: int | None = None,
    ) -> None:
        """`vocab_size`: rows of the model's embedding. Some tokenizers have added tokens beyond it."""
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self._vocab_size = vocab_size or len(tokenizer)
        self._unknown = _tokens_beyond(tokenizer, vocab_size)
        probe = cast(list[int], tokenizer("a")["input_ids"])
        bos = tokenizer.bos_token_id
        self._bos: list[int] = [bos] if bos is not None and probe[:1] == [bos] else []
        self.chat = ChatTemplate(tokenizer)
        if task.type == "text" and tokenizer.eos_token_id is None:
            raise ConfigError(
                "text tasks need a tokenizer with an EOS token, and the model's has none", param="model"
            )
        self._task_answers = self._answers(task.labels) if task.labels else None

    def encode(self, row: Row) -> list[Example]:
        """Returns the examples of a training row: one, or one for each supervised turn of a conversation.

        Raises RowError if the row does not fit the task, its metrics, or `max_length` without its passage.
        """
        if "final_number" in self.task.metrics:
            check_numbers(row)
        if row.kind == "messages":
            assert row.messages is not None
            turns = [index for index, turn in enumerate(row.messages) if turn.is_supervised]
            return [self._conversation(row, row.messages[:index], row.messages[index]) for index in turns]
        return [self.question(row)]

    def question(self, row: Row) -> Example:
        """Returns a row to be answered: its prompt and, for labels, every possible answer. Raises RowError."""
        if row.kind == "messages":
            assert row.messages is not None
            return self._conversation(row, row.messages, None)
        if row.kind == "prompt":
            return self._completion(row)
        if self.task.type != row.kind:
            raise RowError(f"the row is a {row.kind} row, but the task is {self.task.type}", param="question")
        return self._labelled(row)

    def raw(self, text: str) -> Example:
        """Returns text to be continued, without the task's template. Raises RowError if it is too long.

        An empty text begins with BOS, else with EOS, as at OpenAI.
        """
        return self._free(self._bos + self.text(text) or self._beginning(), None, "prompt")

    def _beginning(self) -> list[int]:
        """Returns the token that a text begins with: BOS, else EOS. Raises RowError for a tokenizer with neither."""
        eos = self.tokenizer.eos_token_id
        if not self._bos and eos is None:
            raise RowError("prompt is empty, and the tokenizer has no token to begin with", param="prompt")
        return self._bos or [cast(int, eos)]

    def tokens(self, ids: Sequence[int]) -> Example:
        """Returns tokens to be continued as they are. Raises RowError for unknown ones, or too many."""
        unknown = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise RowError(f"there is no token {unknown}: the model has {self._vocab_size:,}", param="prompt")
        return self._free(list(ids), None, "prompt")

    def text(self, text: str) -> list[int]:
        """Returns the tokens of text, without BOS or EOS. Raises RowError for a token without an embedding."""
        ids = cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self._unknown and (unknown := self._unknown.intersection(ids)):
            token = self.tokenizer.convert_ids_to_tokens(min(unknown))
            raise RowError(
                f"the text contains {token}, a token of the tokenizer that the model has no embedding for"
            )
        return ids

    def continuation(self, text: str) -> list[int]:
        """Returns the tokens of text that follows other text."""
        anchor = self.text(_ANCHOR)
        anchored = self.text(_ANCHOR + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self.text(text)

    def _answers(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        answers = tuple(tuple(self.continuation(" " + label)) for label in labels)
        if len(set(answers)) != len(answers) or not all(answers):
            message = f"labels must have different tokens with the model's tokenizer: {', '.join(labels)}"
            raise RowError(message, param="choices")
        if not (self.task.eos_after_prefix_labels and _has_prefix(answers)):
            return answers
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise RowError(
                f"labels must not begin with another label's tokens ({', '.join(labels)}), because the model's "
                "tokenizer has no EOS token to end the shorter one: rename them",
                param="choices",
            )
        return tuple((*answer, cast(int, eos)) for answer in answers)

    def _labelled(self, row: Row) -> Example:
        labels = row.choices if row.kind == "choice" and row.choices else self.task.labels
        if labels is None:
            raise RowError("the row has no choices, and the task has no labels", param="choices")
        task_answers = self._task_answers if labels == self.task.labels else None
        answers = task_answers or self._answers(labels)
        prompt, truncated = self._prompt(row, labels, self.max_length - max(map(len, answers)))
        if row.answer is not None and row.answer not in labels:
            raise RowError(f"answer {row.answer!r} is not one of the labels", param="answer")
        gold = labels.index(row.answer) if row.answer is not None else None
        return Example(prompt=prompt, answers=answers, labels=labels, gold=gold, truncated=truncated)

    def _prompt(self, row: Row, labels: tuple[str, ...], budget: int) -> tuple[tuple[int, ...], bool]:
        passage = row.passage or ""
        ids = self._render(row, passage, labels)
        truncated = len(ids) > budget
        while len(ids) > budget:
            if not passage:
                raise RowError(
                    f"question and answer have {len(ids) + self.max_length - budget} tokens without the passage, "
                    f"more than max_length {self.max_length}",
                    param="question",
                )
            encoded = self.tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
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
            raise RowError(f"the row is a prompt row, but the task is {self.task.type}", param="prompt")
        text = _fill(self.task.template, {"prompt": row.prompt or ""})
        # An empty prompt has two tokens: of one alone, no position would be intervened on.
        beginning = self._bos if text else self._beginning()
        prompt = beginning + self.text(text if text[-1:].isspace() else text + "\n")
        if row.answer is None:
            return self._free(prompt, None, "prompt")
        eos = cast(int, self.tokenizer.eos_token_id)
        return self._free(prompt, (row.answer, (*self.continuation(row.answer), eos)), "prompt")

    def _conversation(self, row: Row, before: tuple[Message, ...], turn: Message | None) -> Example:
        """Returns the prompt that the turns `before` make, and the answer to it, if there is one."""
        if self.task.type != "text":
            raise RowError(f"the row is a messages row, but the task is {self.task.type}", param="messages")
        first, *others = self.chat.prompt(before, row.tools).split(BREAK)
        prompt = self._bos if self.chat.is_plain else []
        prompt = prompt + self.text(first)
        for piece in others:
            prompt += self.continuation(piece)
        if turn is None:
            return self._free(prompt, None, "messages")
        text = self.chat.answer(before, turn, row.tools)
        answer = [token for piece in text.split(BREAK) for token in self.continuation(piece)]
        is_plain = not turn.tool_calls and turn.reasoning_content is None
        # As a generated answer is shown: without special tokens, of which a call may have some.
        label = turn.content if is_plain else str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return self._free(prompt, (label, (*answer, cast(int, self.chat.end_token))), "messages")

    def _free(self, prompt: list[int], answer: tuple[str, tuple[int, ...]] | None, param: str) -> Example:
        """Returns a text row's example. `answer`: its text and its tokens, the end included."""
        length = len(prompt) + (len(answer[1]) if answer else 0)
        if length > self.max_length and answer:
            raise RowError(
                f"the row has {length} tokens, more than max_length {self.max_length}", param=param
            )
        if length > self.max_length:
            raise context_length_error(length, self.max_length, param)
        return Example(
            prompt=tuple(prompt),
            answers=(answer[1],) if answer else (),
            labels=(answer[0],) if answer else (),
            gold=0 if answer else None,
        )


def context_length_error(tokens: int, max_length: int, param: str) -> RowError:
    """Returns the error of a prompt that is too long. LiteLLM's fallbacks know it by its first words, as OpenAI's."""
    message = (
        f"this model's maximum context length is {max_length} tokens, and the prompt has {tokens}: shorten it"
    )
    return RowError(message, param=param, code=CONTEXT_LENGTH_EXCEEDED)


def _tokens_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> frozenset[int]:
    """Returns the added tokens whose ids are not below `vocab_size`."""
    if vocab_size is None:
        return frozenset()
    return frozenset(token for token in tokenizer.get_added_vocab().values() if token >= vocab_size)


def _has_prefix(answers: tuple[tuple[int, ...], ...]) -> bool:
    """Returns whether one answer's tokens begin with another's. The answers are distinct."""
    # In lexicographic order an answer is followed by those that begin with it.
    ordered = sorted(answers)
    return any(longer[: len(answer)] == answer for answer, longer in pairwise(ordered))


def _fill(template: str, fields: dict[str, str]) -> str:
    """Replaces each {name} in one pass, so that braces inside a value are left alone."""
    return re.sub(r"\{(" + "|".join(fields) + r")\}", lambda match: fields[match[1]], template)
