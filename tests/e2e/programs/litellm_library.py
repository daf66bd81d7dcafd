"""LiteLLM as a library. Arguments: base model, model with tools."""

import json
import os
import sys
from typing import Literal

import litellm
from pydantic import BaseModel

MODEL, TOOLS_MODEL = (f"openai/{name}" for name in sys.argv[1:])
WHERE = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
HELLO = [{"role": "user", "content": "Hello!"}]
#: The model with tools is tiny and random: an open text would not end.
CITY = {"type": "string", "enum": ["Rome", "Paris"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
    },
}


class City(BaseModel):
    name: Literal["Rome", "Paris"]
    is_capital: bool


def chat() -> None:
    answer = litellm.completion(model=MODEL, messages=HELLO, max_tokens=8, temperature=0, **WHERE)
    assert answer.usage.completion_tokens <= 8
    chunks = litellm.completion(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, stream=True, **WHERE
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    completion = litellm.text_completion(
        model=f"text-completion-{MODEL}", prompt="Once", max_tokens=4, **WHERE
    )
    assert isinstance(completion.choices[0].text, str)


def tools_and_schemas() -> None:
    called = litellm.completion(
        model=TOOLS_MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=400, **WHERE
    )
    (call, *_) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in CITY["enum"]
    answer = litellm.completion(
        model=TOOLS_MODEL, messages=HELLO, response_format=City, max_tokens=400, seed=3, **WHERE
    )
    City.model_validate_json(answer.choices[0].message.content)


def errors() -> None:
    """Its fallbacks and retries rest on these classes."""
    cases = [
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "word " * 20_000}]}),
        (litellm.BadRequestError, {"messages": HELLO, "temperature": 1.5, "top_p": 7}),
        (litellm.NotFoundError, {"messages": HELLO, "model": "openai/nothing"}),
        (litellm.AuthenticationError, {"messages": HELLO, "api_key": "heft_wrong_key"}),
    ]
    for expected, changes in cases:
        try:
            litellm.completion(**{"model": MODEL, "max_retries": 0, **WHERE, **changes})
        except expected:
            continue
        raise AssertionError(f"no {expected.__name__}")


chat()
tools_and_schemas()
errors()
