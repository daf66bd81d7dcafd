"""A tokenizer's chat template: conversations as prompts, and assistant turns as the text that is trained.

Prompt
    The template's text up to and including the header of the next assistant turn, with the row's tools. A tokenizer
    without a template has PLAIN_CHAT, with BOS before it where the tokenizer begins texts with one. Templates that
    write a date get TEMPLATE_DATE, so that a prompt is the same whenever it is rendered.
Answer
    A turn without tool calls and reasoning is its content, after white space that the template writes before it
    (Mistral). Any other is what the template adds to its prompt for it, up to the end of the turn. Other text that a
    template writes before every last turn (the empty thoughts of Qwen 3) is left out, as it is in a conversation that
    goes on.
End of the turn
    The special token that the template writes after an answer; EOS where it writes none.
Control tokens
    A message that spells a special token stays text: BREAK divides the spelling until the text is tokenised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from heft_engine.data.chat_rows import Message
from heft_engine.data.tool_calls.format import ToolCallFormat
from heft_engine.data.tool_calls.registry import format_of
from heft_engine.data.tool_rows import Tool, ToolCall, parse_arguments
from heft_engine.errors import RowError

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' + '\n' }}{% endif %}"
)
#: Divides a special token that a message spells. A noncharacter, which no text has (Unicode 23.7).
BREAK = "\ufdd0"
#: The date of templates that write one, by Llama's own name and with its default.
TEMPLATE_DATE = "26 Jul 2024"

_TEXT = "xylophone"
_QUESTION = Message(role="user", content="question")
_TOOL = Tool(name="probe", description="Probes.", parameters={"type": "object", "properties": {}})
_CALL = ToolCall(id="call00001", name="probe", arguments='{"value": "xylophone"}')


class ChatTemplate:
    """The chat template of one tokenizer. What it can render is found out by rendering, once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def is_plain(self) -> bool:
        """Returns True if the tokenizer has no template of its own."""
        return not self.tokenizer.chat_template

    @cached_property
    def end_token(self) -> int | None:
        """The token that ends an assistant turn; None without EOS."""
        match = self._special.match(self._frame[1].lstrip())
        if match is None:
            return cast(int | None, self.tokenizer.eos_token_id)
        return cast(int, self.tokenizer.convert_tokens_to_ids(match[0]))

    @cached_property
    def tool_calls(self) -> ToolCallFormat | None:
        """The format of its tool calls; None if it renders none, or in a format that is not known."""
        call = Message(role="assistant", content="", tool_calls=(_CALL,))
        try:
            return format_of(self._turn((_QUESTION,), call, (_TOOL,)), _CALL)
        except RowError:
            return None

    @cached_property
    def call_tokens(self) -> frozenset[int]:
        """The special tokens that mark tool calls. They are hidden from texts and needed to parse calls."""
        if self.tool_calls is None:
            return frozenset()
        marks = {*self.tool_calls.begins, self.tool_calls.end}
        added = self.tokenizer.added_tokens_decoder
        return frozenset(id for id, token in added.items() if token.special and token.content in marks)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """Returns the text up to the next assistant turn. BREAK stands within special tokens of messages.

        Raises RowError if the template refuses the messages, or does not render tools or tool calls that there are.
        """
        if tools and not self._renders_tools:
            raise RowError(
                f"{self._subject} does not render tools: use a model whose template does", param="tools"
            )
        for index, message in enumerate(messages):
            self._check_rendered(message, index)
        return self._render(messages, tools)

    def answer(self, before: Sequence[Message], turn: Message, tools: Sequence[Tool]) -> str:
        """Returns the text of an assistant turn after its prompt, without its end. Raises RowError."""
        if not turn.tool_calls and turn.reasoning_content is None:
            start, _ = self._frame
            content = turn.content.strip() if self._trims else turn.content
            return self._inserted(start + content if start.isspace() else content)
        path = f"messages[{len(before)}]"
        self._check_rendered(turn, len(before))
        text = self._turn(before, turn, tools, param=path)
        if turn.reasoning_content is not None and self._inserted(turn.reasoning_content.strip()) not in text:
            raise RowError(
                f"{self._subject} does not render reasoning_content: leave it out, or write it into the content",
                param=f"{path}.reasoning_content",
            )
        if turn.tool_calls and turn.content and self._inserted(turn.content.strip()) not in text:
            raise RowError(
                f"{self._subject} does not render content beside tool calls: leave the content of {path} out",
                param=f"{path}.content",
            )
        return text

    def _check_rendered(self, message: Message, index: int) -> None:
        if (message.tool_calls or message.role == "tool") and not self._renders_calls:
            field = "tool_calls" if message.tool_calls else "role"
            raise RowError(
                f"{self._subject} does not render tool calls and their results: use a model whose template does",
                param=f"messages[{index}].{field}",
            )

    @property
    def _subject(self) -> str:
        return "the built-in chat template" if self.is_plain else "the model's chat template"

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """The text that the template adds before and after the content of a last assistant turn."""
        turn = Message(role="assistant", content=_TEXT)
        try:
            start, text, end = self._added((_QUESTION,), turn, ()).partition(_TEXT)
        except RowError:
            return "", ""
        return (start, end) if text else ("", "")

    @cached_property
    def _trims(self) -> bool:
        turn = Message(role="assistant", content=f" {_TEXT} ")
        start, end = self._frame
        try:
            return self._added((_QUESTION,), turn, ()) == start + _TEXT + end
        except RowError:
            return False

    @cached_property
    def _renders_tools(self) -> bool:
        try:
            return self._render((_QUESTION,), (_TOOL,)) != self._render((_QUESTION,), ())
        except RowError:
            return False

    @cached_property
    def _renders_calls(self) -> bool:
        """Returns True if both a call and its result are in the text."""
        call = Message(role="assistant", content="", tool_calls=(_CALL,))
        result = Message(role="tool", content="zither", name=_CALL.name, tool_call_id=_CALL.id)
        try:
            text = self._render((_QUESTION, call, result), (_TOOL,))
        except RowError:
            return False
        return all(part in text for part in (_CALL.name, _TEXT, "zither"))

    def _turn(
        self, before: Sequence[Message], turn: Message, tools: Sequence[Tool], param: str = "messages"
    ) -> str:
        """Returns what the template adds to the prompt for a turn, without what it adds to every last one."""
        text = self._added(before, turn, tools, param)
        start, end = self._frame
        if turn.reasoning_content is None:
            text = text.removeprefix(start)
        if not end or not text.endswith(end):
            raise RowError(f"{self._subject} ends the turn in another way than other turns", param=param)
        return text.removesuffix(end)

    def _added(
        self, before: Sequence[Message], turn: Message, tools: Sequence[Tool], param: str = "messages"
    ) -> str:
        prompt = self._render(before, tools)
        text = self._render((*before, turn), tools, add_generation_prompt=False)
        if not text.startswith(prompt):
            raise RowError(
                f"{self._subject} renders the turns before {param} in another way when it follows",
                param=param,
            )
        return text[len(prompt) :]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool = True
    ) -> str:
        turns = [self._insert(self._as_template_reads(message)) for message in messages]
        schemas = [self._insert(tool.to_json()) for tool in tools] or None
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=schemas,
                chat_template=PLAIN_CHAT if self.is_plain else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                date_string=TEMPLATE_DATE,
            )
        except Exception as error:
            # Templates are code: besides errors of their own (no system turn, turns that do not alternate) they raise
            # any exception of Python's.
            raise RowError(f"{self._subject} refuses the messages: {error}", param="messages") from error
        return cast(str, text)

    def _as_template_reads(self, message: Message) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            fields["name"] = message.name
        if message.reasoning_content is not None:
            fields["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": self._template_id(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": parse_arguments(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            fields["tool_call_id"] = self._template_id(message.tool_call_id)
        return fields

    def _template_id(self, call_id: str) -> str:
        if call_id == _CALL.id or self.tool_calls is None:
            return call_id
        return self.tool_calls.template_id(call_id)

    def _insert(self, value: Any) -> Any:
        """Returns a JSON value with BREAK within every special token that its strings spell."""
        if isinstance(value, str):
            return self._inserted(value)
        if isinstance(value, dict):
            return {self._inserted(name): self._insert(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._insert(item) for item in value]
        return value

    def _inserted(self, text: str) -> str:
        text = text.replace(BREAK, "")
        while (divided := self._special.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)) != text:
            text = divided
        return text
