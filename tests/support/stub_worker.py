"""An inference worker in a thread: real messages from a real broker, made-up answers."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import redis
from kombu import Connection

from store.messages.broker import redis_py_url
from store.messages.predict import PredictMessage

Behaviour = Callable[[PredictMessage], dict[str, Any] | None]


def answered(message: PredictMessage) -> dict[str, Any]:
    """Returns the reply of a worker that predicts yes for every input, with one token a word."""
    rows = [
        {
            "answer": "yes",
            "probability": 0.75,
            "label_probabilities": {"yes": 0.75, "no": 0.25},
            "prompt_tokens": len(str(row.get("question")).split()),
            "completion_tokens": 1,
        }
        for row in message["inputs"]
    ]
    return {"ok": {"data": rows}}


class StubWorker:
    """An inference worker on a thread. `behaviour` returns the reply to a message, or None for no reply."""

    def __init__(self, redis_url: str) -> None:
        self.behaviour: Behaviour = answered
        self.heard: list[PredictMessage] = []
        self.url = redis_url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> StubWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        client = redis.Redis.from_url(redis_py_url(self.url))
        with client, Connection(self.url) as broker, broker.SimpleQueue("predict", no_ack=True) as waiting:
            while not self._ended.is_set():
                try:
                    message: PredictMessage = waiting.get(timeout=0.05).payload[0][0]
                except queue.Empty:
                    continue
                self.heard.append(message)
                reply = self.behaviour(message)
                if reply is not None:
                    client.rpush(
                        message["reply_to"], json.dumps({"request_id": message["request_id"]} | reply)
                    )
