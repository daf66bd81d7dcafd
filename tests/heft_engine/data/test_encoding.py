"""The written contract of heft_engine.data.encoding: prompts, answers and the boundary between them."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from heft_engine.config.metric_names import TaskType
from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example, tokenizer_hash
from heft_engine.data.rows import parse_row
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError, RowError

PASSAGE = {"question": "is it so", "passage": "The sea is wide.", "answer": True}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer without BOS, with a chat template, like those of GPT-NeoX and SmolLM2."""
    path = tmp_path_factory.mktemp("bpe")
    save_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerBase:
    """A SentencePiece tokenizer like Llama 2's: it adds a leading space to every text, and a BOS before it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzTQAP▁:?.\n"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: is it so?\nAnswer: yes no The sea is wide."] * 50, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def encoder(tokenizer: Any, kind: TaskType = "yes_no", max_length: int = 400, **task: Any) -> Encoder:
    return Encoder(tokenizer, Task.resolve(TaskSettings(**task), kind), max_length)


def ask(encoder: Encoder, **row: Any) -> Example:
    return encoder.question(
        parse_row(row, labels=encoder.task.labels if encoder.task.type == "choice" else None)
    )


def prompt(encoder: Encoder, **row: Any) -> str:
    return str(encoder.tokenizer.decode(ask(encoder, **row).prompt))


# -- prompt


def test_the_default_template_is_filled(bpe: Any) -> None:
    assert prompt(encoder(bpe), **PASSAGE) == "The sea is wide.\nQuestion: is it so?\nAnswer:"


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{passage}\nQ: {question}", "Q: so?"),
        ("Q: {question}\n{passage}", "Q: so?"),
        ("Read.\n  {passage}\nQ: {question}", "Read.\nQ: so?"),
        # Only a line that holds nothing else goes away.
        ("Text: {passage}\nQ: {question}", "Text: \nQ: so?"),
        ("{question}{passage}\nA:", "so?\nA:"),
    ],
)
def test_a_line_that_only_holds_an_absent_passage_goes_away(bpe: Any, template: str, filled: str) -> None:
    assert prompt(encoder(bpe, template=template), question="so", answer=True) == filled


def test_choices_are_listed_where_the_template_asks_for_them(bpe: Any) -> None:
    listed = encoder(bpe, "choice", template="{question}\n{choices}\nAnswer:")
    row = {"question": "what", "choices": ["a sea", "a river"], "answer": "a sea"}
    assert prompt(listed, **row) == "what?\n- a sea\n- a river\nAnswer:"
    assert prompt(encoder(bpe, template="{question}\n{choices}\nA:"), question="so", answer=True) == "so?\nA:"


@pytest.mark.parametrize("question", ["is it so", "is it so?", "is it so ?", " is it so??", "is it so? ? "])
def test_one_question_mark_ends_the_question(bpe: Any, question: str) -> None:
    assert prompt(encoder(bpe), question=question, answer=True) == "Question: is it so?\nAnswer:"


def test_braces_in_values_stay_what_they_are(bpe: Any) -> None:
    row = {"question": "is {passage} {x}", "passage": "{question} {0} {", "answer": True}
    assert prompt(encoder(bpe), **row) == "{question} {0} {\nQuestion: is {passage} {x}?\nAnswer:"


def test_a_prompt_without_white_space_at_its_end_gets_one_newline(bpe: Any) -> None:
    text = encoder(bpe, "text")
    assert prompt(text, prompt="Say it", completion="yes") == "Say it\n"
    assert prompt(text, prompt="Say it: ", completion="yes") == "Say it: "
    assert prompt(encoder(bpe, "text", template="<{prompt}>"), prompt="a", completion="b") == "<a>\n"


def test_bos_stands_first_only_where_the_tokenizer_puts_it(bpe: Any, pieces: Any) -> None:
    assert ask(encoder(pieces), **PASSAGE).prompt[0] == pieces.bos_token_id
    assert ask(encoder(pieces, "text"), prompt="a", completion="b").prompt[0] == pieces.bos_token_id
    assert bpe.bos_token_id not in ask(encoder(bpe), **PASSAGE).prompt


# -- answer and boundary


def test_yes_and_no_are_a_space_and_the_word_and_nothing_follows(bpe: Any, pieces: Any) -> None:
    for tokenizer, yes, no in ((bpe, ["Ġyes"], ["Ġno"]), (pieces, ["▁yes"], ["▁no"])):
        example = ask(encoder(tokenizer), **PASSAGE)
        assert [tokenizer.convert_ids_to_tokens(answer) for answer in example.answers] == [yes, no]
        assert (example.labels, example.gold) == (("yes", "no"), 0)


def test_a_leading_space_means_the_same_to_both_kinds_of_tokenizer(bpe: Any, pieces: Any) -> None:
    """The answer's first token is the one that the whole text has at that place."""
    for tokenizer in (bpe, pieces):
        example = ask(encoder(tokenizer), **PASSAGE)
        whole = tokenizer("The sea is wide.\nQuestion: is it so?\nAnswer: yes")["input_ids"]
        assert [*example.prompt, *example.answers[0]] == whole


def test_the_boundary_does_not_move_with_the_words_beside_it(bpe: Any, pieces: Any) -> None:
    for tokenizer in (bpe, pieces):
        text = encoder(tokenizer, "text")
        prompts = {ask(text, prompt="so: ", completion=c).prompt for c in ("yes", " yes", "\nyes", ":", "s")}
        assert len(prompts) == 1
        answers = {ask(text, prompt=p, completion="yes").answers for p in ("a ", "a y", ":", "a\n", "yes ")}
        assert len(answers) == 1


def test_an_empty_prompt_is_the_beginning_of_a_text(bpe: Any, pieces: Any) -> None:
    """Files of texts without a question have it. As a prompt to continue, it begins as a document does."""
    text = encoder(bpe, "text")
    assert ask(text, prompt="", completion="so it is").prompt == (bpe.eos_token_id, *text.text("\n"))
    assert text.raw("").prompt == (bpe.eos_token_id,)
    assert encoder(pieces, "text").raw("").prompt == (pieces.bos_token_id,)
    with pytest.raises(RowError, match="prompt is missing"):
        ask(text, completion="so it is")


def test_completions_end_with_eos_and_come_back_as_written(bpe: Any) -> None:
    for completion in ("yes", " yes.", "two\n\nlines ", "ünï 世界"):
        (answer,) = ask(encoder(bpe, "text"), prompt="a", completion=completion).answers
        assert answer[-1] == bpe.eos_token_id
        assert bpe.decode(answer[:-1]) == completion


def test_choices_carry_the_rows_own_answers(bpe: Any) -> None:
    row = {"question": "what", "choices": ["a sea", "a river", "sea"], "answer": "a river"}
    example = ask(encoder(bpe, "choice"), **row)
    assert [bpe.decode(answer) for answer in example.answers] == [" a sea", " a river", " sea"]
    assert (example.labels, example.gold) == (("a sea", "a river", "sea"), 1)
    assert example.supervised().answers == (example.answers[1],)


def test_shared_labels_serve_rows_without_choices(bpe: Any) -> None:
    example = ask(encoder(bpe, "choice", labels=["pos", "neg"]), question="how is it", answer="neg")
    assert [bpe.decode(answer) for answer in example.answers] == [" pos", " neg"]
    assert example.gold == 1


def test_labels_that_tokenise_alike_are_refused(pieces: Any) -> None:
    with pytest.raises(
        RowError, match="labels must have different tokens with the model's tokenizer: Ω, Δ"
    ) as refused:
        ask(encoder(pieces, "choice"), question="what", choices=["Ω", "Δ"], answer="Ω")
    assert refused.value.param == "choices"


def test_labels_that_begin_with_anothers_tokens_all_end_with_eos(pieces: Any) -> None:
    """Without an end the longer label could never be the likelier one: its score is the shorter one's times more."""
    labels = ["a sea", "a", "yes"]
    example = ask(encoder(pieces, "choice", labels=labels), question="what", answer="a sea")
    ends = [answer[-1] for answer in example.answers]
    assert ends == [pieces.eos_token_id] * 3
    assert [pieces.decode(answer[:-1]) for answer in example.answers] == labels
    others = ask(encoder(pieces, "choice"), question="what", choices=["a", "yes"], answer="a").answers
    assert pieces.eos_token_id not in {answer[-1] for answer in others}


def test_labels_of_a_bundle_from_before_have_no_end(pieces: Any) -> None:
    task = {"type": "choice", "template": "{question}", "labels": ["a sea", "a"]}
    example = Encoder(pieces, Task.from_json(task), 400).question(
        parse_row({"question": "b"}, labels=["a sea", "a"], need_answer=False)
    )
    assert all(answer[-1] != pieces.eos_token_id for answer in example.answers)


def test_labels_that_begin_with_anothers_tokens_need_an_eos_token(bpe: Any) -> None:
    tokenizer = copy.deepcopy(bpe)
    tokenizer.eos_token = None
    with pytest.raises(RowError, match="has no EOS token to end the shorter one: rename them") as refused:
        ask(encoder(tokenizer, "choice"), question="what", choices=["a", "a sea"], answer="a")
    assert refused.value.param == "choices"


def test_a_token_without_an_embedding_is_refused_by_name(bpe: Any) -> None:
    """gemma-3-1b has one: its tokenizer is that of the larger models, which read images."""
    tokenizer = copy.deepcopy(bpe)
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("[NEW]", normalized=False)])
    text = Encoder(tokenizer, Task.resolve(TaskSettings(), "text"), 400, vocab_size=size)
    message = re.escape("contains [NEW], a token of the tokenizer that the model has no embedding for")
    for row in ({"prompt": "a [NEW] b", "completion": "c"}, {"prompt": "a", "completion": "[NEW]"}):
        with pytest.raises(RowError, match=message):
            ask(text, **row)
    with pytest.raises(RowError, match=message):
        text.raw("[NEW]")
    assert text.raw("[NE W]").prompt


# -- conversations

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "two", "weight": 0},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "three"},
]


def test_each_supervised_turn_is_an_example_whose_prompt_is_what_came_before(bpe: Any) -> None:
    first, last = encoder(bpe, "text").encode(parse_row({"messages": TURNS}))
    assert bpe.decode(first.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [bpe.decode(e.answers[0]) for e in (first, last)] == ["one<|im_end|>", "three<|im_end|>"]
    assert "two<|im_end|>" in bpe.decode(last.prompt)
    assert bpe.convert_tokens_to_ids("<|im_start|>") == first.prompt[0]


def test_a_conversation_is_scored_with_its_training_prompt(bpe: Any) -> None:
    text = encoder(bpe, "text")
    question = text.question(parse_row({"messages": TURNS[:2]}, need_answer=False))
    assert question.prompt == text.encode(parse_row({"messages": TURNS[:3]}))[0].prompt
    assert question.answers == ()


def test_without_a_chat_template_a_plain_one_serves(pieces: Any) -> None:
    """With one BOS, where the tokenizer begins texts with it, and EOS, as for prompts."""
    (example,) = encoder(pieces, "text").encode(parse_row({"messages": TURNS[1:3]}))
    assert pieces.decode(example.prompt[1:]) == "user: a?\nassistant:\n"
    assert [token for token in example.prompt if token == pieces.bos_token_id] == [example.prompt[0]]
    assert example.answers[0][-1] == pieces.eos_token_id


def test_a_conversation_that_the_chat_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    text = encoder(AutoTokenizer.from_pretrained(tmp_path), "text")
    with pytest.raises(RowError, match="no system turns") as refused:
        text.encode(parse_row({"messages": TURNS}))
    assert refused.value.param == "messages"


# -- what a bundle freezes


def test_a_task_survives_its_json() -> None:
    task = Task.resolve(TaskSettings(type="choice", labels=["a", "b"], template="{question}"), "choice")
    assert Task.from_json(task.to_json()) == task
    yes_no = Task.resolve(TaskSettings(), "yes_no")
    assert Task.from_json(yes_no.to_json()) == yes_no


@pytest.mark.parametrize(
    ("settings", "param"),
    [(TaskSettings(type="text"), "task.type"), (TaskSettings(template="{passage}"), "task.template")],
)
def test_a_task_that_does_not_fit_the_rows_is_refused(settings: TaskSettings, param: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Task.resolve(settings, "yes_no")
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_hash_of_a_tokenizer_sees_what_decides_tokens(tmp_path: Path, bpe: Any, name: str) -> None:
    save_tokenizer(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    changes: dict[str, Callable[[str], str]] = {
        "tokenizer.json": lambda text: text.replace('"add_prefix_space":false', '"add_prefix_space":true'),
        "tokenizer_config.json": lambda text: text.replace(
            '"eos_token": "</s>"', '"eos_token": "<|im_end|>"'
        ),
        "chat_template.jinja": lambda text: text + "x",
    }
    file = tmp_path / "two" / name
    file.write_text(changes[name](file.read_text()))
    same, other = (AutoTokenizer.from_pretrained(tmp_path / d) for d in ("one", "two"))
    assert tokenizer_hash(same) == tokenizer_hash(bpe)
    assert tokenizer_hash(other) != tokenizer_hash(bpe)
