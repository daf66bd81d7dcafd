"""Tool calls on rows that were not trained: the shares that parse and that are right, with the base's beside them.

    python -m benchmarks.tool_calls                              2,000 conversations, as `make bench-tool-calls`
    python -m benchmarks.tool_calls --rows 100 --held-out 40     a look

Makes conversations in which the assistant calls one of two offered tools, trains LoRA on them, and asks the base and
the fine-tuned model for the calls of others. No conversation is in both. Writes tool_calls.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processor import processor
from heft_engine import TrainConfig, load, load_base, train
from heft_engine.config.train import LoraStage
from heft_engine.data.rows import Row, parse_row
from heft_engine.data.tool_calls.format import AnswerParser
from heft_engine.data.tool_rows import ToolCall
from heft_engine.evaluation.evaluate import MetricMean
from heft_engine.inference.greedy import eos_token_ids, generate
from heft_engine.serving.predictor import Predictor

RESULT = Path(__file__).with_suffix(".json")
_CITIES = (
    "Rome",
    "Oslo",
    "Lima",
    "Kyoto",
    "Accra",
    "Porto",
    "Quito",
    "Hanoi",
    "Turin",
    "Perth",
    "Bergen",
    "Malmö",
)
_NAMES = ("Ada", "Bruno", "Chen", "Dana", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kaia", "Luis")
_CURRENCIES = ("euro", "dollar", "yen", "krona", "peso", "franc")
_TEXTS = (
    "I am late",
    "the train is full",
    "see you at noon",
    "bring the keys",
    "the door is open",
    "call me back",
)
_SONGS = ("Blue Train", "Clair de Lune", "So What", "Gymnopedie", "Naima", "Take Five", "Misty", "Boplicity")
#: Tools: name, description, parameters with their JSON types, and ways to ask for it.
_KINDS: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    (
        "weather",
        "The weather of a city.",
        {"city": "string"},
        ("How is the weather in {city}?", "Is it warm in {city}?"),
    ),
    (
        "convert",
        "Converts an amount of money.",
        {"amount": "integer", "source": "string", "target": "string"},
        ("How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}."),
    ),
    (
        "send_message",
        "Sends a message to a person.",
        {"to": "string", "text": "string"},
        ("Tell {to}: {text}.", "Write to {to} that {text}."),
    ),
    (
        "set_alarm",
        "Sets an alarm.",
        {"hour": "integer", "minute": "integer"},
        ("Wake me at {hour}:{minute:02}.", "Set an alarm for {hour}:{minute:02}."),
    ),
    (
        "find_trains",
        "Finds trains between two cities.",
        {"origin": "string", "destination": "string"},
        (
            "When does a train go from {origin} to {destination}?",
            "Find a train from {origin} to {destination}.",
        ),
    ),
    ("play", "Plays a piece of music.", {"title": "string"}, ("Play {title}.", "I want to hear {title}.")),
)
_VALUES: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("city", "origin", "destination"), _CITIES),
    **dict.fromkeys(("source", "target"), _CURRENCIES),
    "to": _NAMES,
    "text": _TEXTS,
    "title": _SONGS,
    "amount": range(2, 1_000),
    "hour": range(24),
    "minute": range(60),
}
_OFFERED = 2


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of the held-out rows, each with Wilson's interval."""

    parsed: MetricMean
    right: MetricMean

    def to_json(self) -> dict[str, Any]:
        return {"parsed": self.parsed.to_json(), "right": self.right.to_json()}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(arguments if arguments is not None else sys.argv[1:])
    options = parser().parse_args(arguments)
    conversations = make_conversations(options.rows + options.held_out, seed=options.seed)
    rows = [parse_row(next(conversations)) for _ in range(options.rows)]
    held_out = [parse_row(next(conversations)) for _ in range(options.held_out)]
    base = measure(load_base(options.model, task="text"), held_out)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heft-tool-calls-") as folder:
        stage = LoraStage(
            n_epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate
        )
        config = TrainConfig(model=options.model, stages=[stage], seed=options.seed)
        train(config, rows, [], Path(folder) / "bundle", lambda event: None)
        seconds = time.monotonic() - began
        tuned = measure(load(Path(folder) / "bundle"), held_out)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.tool_calls", *arguments]),
        "processor": processor(),
        "rows": options.rows,
        "held_out": options.held_out,
        "training_seconds": round(seconds, 1),
        "base": base.to_json(),
        "fine_tuned": tuned.to_json(),
    }
    RESULT.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.tool_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", default="smollm2-135m")
    top.add_argument("--rows", type=int, default=2_000)
    top.add_argument("--held-out", type=int, default=200)
    top.add_argument("--epochs", type=int, default=1)
    top.add_argument("--batch-size", type=int, default=8)
    top.add_argument("--learning-rate", type=float, default=1e-3)
    top.add_argument("--seed", type=int, default=0)
    return top


def make_conversations(count: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `count` different rows. Three of ten go on with the call's result and an answer."""
    random_numbers = random.Random(seed)
    questions: set[str] = set()
    while len(questions) < count:
        row, question = _conversation(random_numbers)
        if question not in questions:
            questions.add(question)
            yield row


def _conversation(random_numbers: random.Random) -> tuple[dict[str, Any], str]:
    offered = random_numbers.sample(_KINDS, _OFFERED)
    name, _, parameters, questions = random_numbers.choice(offered)
    arguments = {field: random_numbers.choice(_VALUES[field]) for field in parameters}
    question = random_numbers.choice(questions).format(**arguments)
    call = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
    ]
    if random_numbers.random() < 0.3:
        messages.append({"role": "tool", "tool_call_id": "call_1", "content": '{"ok": true}'})
        messages.append({"role": "assistant", "content": "Done."})
    return {"messages": messages, "tools": [_tool(*kind[:3]) for kind in offered]}, question


def _tool(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {field: {"type": kind} for field, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def measure(predictor: Predictor, rows: Sequence[Row]) -> Accuracy:
    """Asks for the first assistant turn of each row, greedily."""
    encoder = predictor.encoder
    examples = [encoder.encode(row)[0] for row in rows]
    answers = generate(
        predictor.lm,
        examples,
        eos_tokens=eos_token_ids(predictor.lm, encoder.chat),
        max_new_tokens=[2 * len(example.answers[0]) for example in examples],
    )
    parsed, right = [], []
    for row, tokens in zip(rows, answers, strict=True):
        calls = _calls(predictor, row, tokens)
        parsed.append(float(bool(calls)))
        right.append(float(_same(calls, _reference(row))))
    return Accuracy(parsed=MetricMean.of("exact_match", parsed), right=MetricMean.of("exact_match", right))


def _calls(predictor: Predictor, row: Row, tokens: Sequence[int]) -> list[ToolCall]:
    format = predictor.encoder.chat.tool_calls
    assert format is not None, "the model's chat template has no tools"
    answer = AnswerParser(format, {tool.name for tool in row.tools})
    parts = answer.push(str(predictor.encoder.tokenizer.decode(tokens))) + answer.flush()
    return [part for part in parts if isinstance(part, ToolCall)]


def _reference(row: Row) -> tuple[ToolCall, ...]:
    assert row.messages is not None
    return row.messages[1].tool_calls


def _same(calls: Sequence[ToolCall], reference: Sequence[ToolCall]) -> bool:
    return [(call.name, json.loads(call.arguments)) for call in calls] == [
        (call.name, json.loads(call.arguments)) for call in reference
    ]


if __name__ == "__main__":
    main()
