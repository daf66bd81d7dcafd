"""Conversations with tools in the chat templates of the families: what is trained is what is rendered when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xgrammar
from tiny_models import CHAT_FAMILIES, TOOL_FAMILIES, chat_tokenizer
from transformers import AutoTokenizer

from heft_engine.config.train import TaskSettings
from heft_engine.data.encoding import Encoder, Example, tokenizer_hash
from heft_engine.data.rows import parse_row
from heft_engine.data.task import Task
from heft_engine.data.tool_calls.format import AnswerParser
from heft_engine.data.tool_rows import ToolCall
from heft_engine.errors import RowError
from heft_engine.inference.grammar import Constraint, GrammarCompiler

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(city: str = "Rome", id: str = "call_VvvODy9mT") -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


QUESTION = {"role": "user", "content": "Is it warm in Rome?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [call()]}
RESULT = {"role": "tool", "tool_call_id": "call_VvvODy9mT", "content": "31 degrees"}
ANSWER = {"role": "assistant", "content": "Yes, very."}
CONVERSATION = [QUESTION, CALL, RESULT, ANSWER]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    task = Task.resolve(TaskSettings(), "text")
    return {
        name: Encoder(chat_tokenizer(tmp_path_factory.mktemp(name), name), task, 2_000)
        for name in CHAT_FAMILIES
    }


def train(encoder: Encoder, messages: list[Any], tools: Any = TOOLS) -> list[Example]:
    return encoder.encode(parse_row({"messages": messages, "tools": tools}))


def ask(encoder: Encoder, messages: list[Any], tools: Any = TOOLS) -> Example:
    return encoder.question(parse_row({"messages": messages, "tools": tools}, need_answer=False))


def text(encoder: Encoder, tokens: Any) -> str:
    return str(encoder.tokenizer.decode(tokens))


@pytest.mark.parametrize("name", TOOL_FAMILIES)
class TestRoundTrip:
    def test_the_call_and_the_end_of_its_turn_are_supervised(
        self, encoders: dict[str, Encoder], name: str
    ) -> None:
        encoder, family = encoders[name], CHAT_FAMILIES[name]
        of_call, of_answer = train(encoder, CONVERSATION)
        assert text(encoder, of_call.answers[0]) == family.call + family.end
        assert text(encoder, of_answer.answers[0]).strip() == "Yes, very." + family.end
        assert of_call.answers[0][-1] == encoder.tokenizer.convert_tokens_to_ids(family.end)

    def test_a_request_has_the_prompt_of_training(self, encoders: dict[str, Encoder], name: str) -> None:
        encoder = encoders[name]
        of_call, of_answer = train(encoder, CONVERSATION)
        assert ask(encoder, [QUESTION]).prompt == of_call.prompt
        assert ask(encoder, [QUESTION, CALL, RESULT]).prompt == of_answer.prompt
        rendered = text(encoder, of_answer.prompt)
        assert "The weather of a city." in rendered
        assert "31 degrees" in rendered

    def test_what_was_trained_is_rendered_when_the_conversation_goes_on(
        self, encoders: dict[str, Encoder], name: str
    ) -> None:
        of_call, of_answer = train(encoders[name], CONVERSATION)
        trained = of_call.prompt + of_call.answers[0]
        assert of_answer.prompt[: len(trained)] == trained

    def test_the_call_is_read_back_and_renders_the_same_tokens(
        self, encoders: dict[str, Encoder], name: str
    ) -> None:
        """The id comes back too, where the family writes one."""
        encoder = encoders[name]
        format = encoder.chat.tool_calls
        assert format is not None
        assert format.name == CHAT_FAMILIES[name].format
        of_call, of_answer = train(encoder, CONVERSATION)
        parser = AnswerParser(format, {"weather"})
        (read,) = parser.push(text(encoder, of_call.answers[0][:-1])) + parser.flush()
        assert isinstance(read, ToolCall)
        assert json.loads(read.arguments) == {"city": "Rome"}
        function = {"name": read.name, "arguments": read.arguments}
        again = {"role": "assistant", "content": None, "tool_calls": [{"id": read.id, "function": function}]}
        assert ask(encoder, [QUESTION, again, {**RESULT, "tool_call_id": read.id}]).prompt == of_answer.prompt

    def test_two_calls_in_one_turn(self, encoders: dict[str, Encoder], name: str) -> None:
        encoder, family = encoders[name], CHAT_FAMILIES[name]
        both = {"role": "assistant", "tool_calls": [call(), call("Oslo", id="call_2")]}
        if not family.parallel:
            with pytest.raises(RowError, match="only supports single tool-calls"):
                train(encoder, [QUESTION, both])
            return
        (example,) = train(encoder, [QUESTION, both])
        assert encoder.chat.tool_calls is not None
        parser = AnswerParser(encoder.chat.tool_calls, {"weather"})
        calls = parser.push(text(encoder, example.answers[0][:-1])) + parser.flush()
        assert [json.loads(c.arguments)["city"] for c in calls if isinstance(c, ToolCall)] == ["Rome", "Oslo"]

    @pytest.mark.parametrize("parallel", [True, False])
    def test_the_grammar_of_required_calls_allows_what_was_trained_and_no_other_text(
        self, encoders: dict[str, Encoder], name: str, parallel: bool
    ) -> None:
        encoder, family = encoders[name], CHAT_FAMILIES[name]
        format = encoder.chat.tool_calls
        assert format is not None
        other = {"function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
        row = parse_row({"messages": [QUESTION], "tools": [*TOOLS, other]}, need_answer=False)
        grammar = format.grammar(row.tools, parallel=parallel)
        constraint = Constraint(
            kind="structural_tag", source=json.dumps({"type": "structural_tag", "format": grammar})
        )
        tokenizer = encoder.tokenizer
        end = tokenizer.convert_tokens_to_ids(family.end)
        compiler = GrammarCompiler(tokenizer, vocab_size=len(tokenizer), eos_tokens=[end])
        compiled = compiler.compile(constraint)

        def accepts(tokens: Any) -> bool:
            matcher = xgrammar.GrammarMatcher(compiled)
            return all(matcher.accept_token(token) for token in tokens) and matcher.is_terminated()

        (example,) = train(encoder, [QUESTION, CALL])
        assert accepts(example.answers[0])
        assert not accepts([*encoder.continuation("It is warm."), end])
        assert not accepts([end])
        unknown = [*encoder.continuation(family.call.replace("weather", "climate")), end]
        assert not accepts(unknown)
        if family.parallel:
            both = {"role": "assistant", "tool_calls": [call(), call("Oslo", id="call_2")]}
            assert accepts(train(encoder, [QUESTION, both])[0].answers[0]) == parallel

    def test_control_tokens_in_messages_tools_and_arguments_stay_text(
        self, encoders: dict[str, Encoder], name: str
    ) -> None:
        encoder, family = encoders[name], CHAT_FAMILIES[name]
        end = encoder.tokenizer.convert_tokens_to_ids(family.end)
        forged = f"x{family.end}{family.special[0]}"
        tools = json.loads(json.dumps(TOOLS).replace("The weather", forged))
        messages = [
            {"role": "user", "content": forged},
            {"role": "assistant", "tool_calls": [call(forged)]},
            {**RESULT, "content": forged},
            {"role": "assistant", "content": forged},
        ]
        honest, forging = train(encoder, CONVERSATION), train(encoder, messages, tools)
        for known, example in zip(honest, forging, strict=True):
            assert example.prompt.count(end) == known.prompt.count(end)
            assert example.answers[0].count(end) == 1
        assert text(encoder, forging[0].prompt).count(forged) == 2
        assert text(encoder, forging[1].answers[0]).strip() == forged + family.end


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_turns_without_tools_are_rendered_as_they_were_trained(
    encoders: dict[str, Encoder], name: str
) -> None:
    encoder = encoders[name]
    again = {"role": "user", "content": "And in Oslo?"}
    first, second = train(encoder, [QUESTION, ANSWER, again, ANSWER], tools=[])
    assert ask(encoder, [QUESTION], tools=[]).prompt == first.prompt
    assert ask(encoder, [QUESTION, ANSWER, again], tools=[]).prompt == second.prompt
    trained = first.prompt + first.answers[0]
    assert second.prompt[: len(trained)] == trained
    assert text(encoder, first.answers[0]).strip() == "Yes, very." + CHAT_FAMILIES[name].end


def test_content_and_thoughts_beside_a_call_are_trained_or_refused(encoders: dict[str, Encoder]) -> None:
    said = {**CALL, "content": "I will look."}
    for name, qwen in (("qwen2", True), ("qwen3", True), ("hermes", False), ("llama3", False)):
        if qwen:
            (example,) = train(encoders[name], [QUESTION, said])
            assert text(encoders[name], example.answers[0]).startswith("I will look.\n<tool_call>")
            continue
        with pytest.raises(RowError, match="does not render content beside tool calls") as refusal:
            train(encoders[name], [QUESTION, said])
        assert refusal.value.param == "messages[1].content"

    thought = {**CALL, "reasoning_content": "Rome is a city."}
    (example,) = train(encoders["qwen3"], [QUESTION, thought])
    assert text(encoders["qwen3"], example.answers[0]).startswith(
        "<think>\nRome is a city.\n</think>\n\n<tool_call>"
    )
    _, after = train(encoders["qwen3"], [QUESTION, thought, RESULT, ANSWER])
    trained = example.prompt + example.answers[0]
    assert after.prompt[: len(trained)] == trained
    with pytest.raises(RowError, match="does not render reasoning_content") as refusal:
        train(encoders["qwen2"], [QUESTION, thought])
    assert refusal.value.param == "messages[1].reasoning_content"


def test_a_template_without_tools_refuses_them_by_name(encoders: dict[str, Encoder]) -> None:
    gemma = encoders["gemma"]
    assert gemma.chat.tool_calls is None
    with pytest.raises(RowError, match="the model's chat template does not render tools") as refusal:
        train(gemma, CONVERSATION)
    assert refusal.value.param == "tools"
    with pytest.raises(RowError, match="does not render tool calls and their results") as refusal:
        ask(gemma, [QUESTION, CALL, RESULT], tools=[])
    assert refusal.value.param == "messages[1].tool_calls"
    (example,) = train(gemma, [QUESTION, {"role": "assistant", "content": " Yes. "}], tools=[])
    assert text(gemma, example.answers[0]) == "Yes.<end_of_turn>", "as its template trims it"


def test_the_date_in_a_prompt_is_always_the_same(encoders: dict[str, Encoder]) -> None:
    assert "Today Date: 26 Jul 2024" in text(encoders["llama3"], ask(encoders["llama3"], [QUESTION]).prompt)


def test_a_template_in_an_unknown_format_renders_calls_that_are_not_read(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "qwen2")
    tokenizer.chat_template = tokenizer.chat_template.replace("<tool_call>", "<function>")
    encoder = Encoder(tokenizer, Task.resolve(TaskSettings(), "text"), 2_000)
    assert encoder.chat.tool_calls is None
    (example,) = train(encoder, [QUESTION, CALL])
    assert "<function>" in text(encoder, example.answers[0])


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_of_several_templates_the_one_for_tools_renders_tools(tmp_path: Path, tools: list[Any]) -> None:
    """From a list in tokenizer_config.json, and from `additional_chat_templates/`, where they are saved."""
    task = Task.resolve(TaskSettings(), "text")
    tokenizer = chat_tokenizer(tmp_path, "qwen2")
    prompt = ask(Encoder(tokenizer, task, 2_000), [QUESTION], tools).prompt
    template = tokenizer.chat_template
    named = {"tool_use": template, "default": template.replace("{%- if tools %}", "{%- if false %}")}
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    listed = AutoTokenizer.from_pretrained(tmp_path)
    listed.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    for tokenizer in (listed, saved):
        assert tokenizer.chat_template == named
        assert ask(Encoder(tokenizer, task, 2_000), [QUESTION], tools).prompt == prompt
    assert tokenizer_hash(listed) == tokenizer_hash(saved)


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "qwen2")
    tokenizer.chat_template = {"rag": tokenizer.chat_template}
    with pytest.raises(RowError, match="no default"):
        ask(Encoder(tokenizer, Task.resolve(TaskSettings(), "text"), 2_000), [QUESTION], [])
