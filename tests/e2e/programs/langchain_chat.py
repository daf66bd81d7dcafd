"""LangChain's ChatOpenAI and OpenAI, as its documentation uses them. Arguments: base model, model with tools."""

import asyncio
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

MODEL, TOOLS_MODEL = sys.argv[1:]


#: The model with tools is tiny and random: an open text would not end.
CityName = Literal["Rome", "Paris"]


class City(BaseModel):
    """A city."""

    name: CityName
    is_capital: bool


@tool
def weather(city: CityName) -> str:
    """The weather of a city."""
    return f"Sunny in {city}."


def chat() -> None:
    model = ChatOpenAI(model=MODEL, temperature=0, max_tokens=8, seed=1)
    answer = model.invoke([SystemMessage("Be brief."), HumanMessage("Hello!")])
    assert isinstance(answer.content, str)
    assert answer.usage_metadata["output_tokens"] <= 8
    assert answer.response_metadata["system_fingerprint"].startswith("fp_")
    streamed = "".join(
        chunk.content for chunk in model.stream([SystemMessage("Be brief."), HumanMessage("Hello!")])
    )
    assert streamed == answer.content
    assert len(model.batch(["One", "Two", "Three"])) == 3
    assert asyncio.run(model.ainvoke("Hello!")).content
    completion = OpenAI(model=MODEL, temperature=0, max_tokens=4).invoke("Once upon a time")
    assert isinstance(completion, str)


def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        model = ChatOpenAI(model=TOOLS_MODEL, temperature=1, max_tokens=400, seed=3)
        city = model.with_structured_output(City, method=method).invoke(
            "Which city is the capital of France?"
        )
        assert isinstance(city, City), (method, city)


def tools() -> None:
    model = ChatOpenAI(model=TOOLS_MODEL, temperature=1, max_tokens=400, seed=5).bind_tools(
        [weather], tool_choice="any"
    )
    question = HumanMessage("What is the weather in Rome?")
    called = model.invoke([question])
    (call, *_) = called.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Paris")
    results = [
        ToolMessage(weather.invoke(each["args"]), tool_call_id=each["id"]) for each in called.tool_calls
    ]
    free = ChatOpenAI(model=TOOLS_MODEL, temperature=0, max_tokens=8).bind_tools([weather])
    assert free.invoke([question, called, *results]).usage_metadata["output_tokens"] <= 8
    streamed = None
    for chunk in model.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["name"] == "weather"
    assert streamed.tool_calls[0]["args"] == call["args"]


chat()
structured_output()
tools()
