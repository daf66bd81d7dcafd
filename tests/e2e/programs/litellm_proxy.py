"""The unmodified openai package through LiteLLM's proxy. Arguments: base model, model with tools."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from socket import socket

import httpx
import openai

MODEL, TOOLS_MODEL = sys.argv[1:]
CONFIG = f"""
model_list:
  - model_name: team-model
    litellm_params:
      model: openai/{MODEL}
      api_base: os.environ/OPENAI_BASE_URL
      api_key: os.environ/OPENAI_API_KEY
general_settings:
  master_key: sk-a-key-of-the-proxy-for-this-test-0123456789
"""
KEY = "sk-a-key-of-the-proxy-for-this-test-0123456789"


def free_port() -> int:
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key=KEY, timeout=60)
    messages = [{"role": "user", "content": "Hello!"}]
    settings = {"model": "team-model", "messages": messages, "temperature": 0, "max_tokens": 8}
    answer = client.chat.completions.create(**settings)
    chunks = client.chat.completions.create(**settings, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == answer.choices[0].message.content
    try:
        client.chat.completions.create(**{**settings, "temperature": 1.5, "top_p": 7})
    except openai.BadRequestError:
        return
    raise AssertionError("no BadRequestError")


with tempfile.TemporaryDirectory() as folder:
    config = Path(folder, "config.yaml")
    config.write_text(CONFIG)
    port = free_port()
    command = [Path(sys.executable).with_name("litellm"), "--config", config, "--port", str(port)]
    proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], env={**os.environ, "NO_PROXY": "127.0.0.1"})
    try:
        deadline = time.monotonic() + 120
        while True:
            assert proxy.poll() is None, "the proxy has ended"
            assert time.monotonic() < deadline, "the proxy does not answer"
            try:
                httpx.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        ask(f"http://127.0.0.1:{port}")
    finally:
        proxy.terminate()
        proxy.wait(30)
