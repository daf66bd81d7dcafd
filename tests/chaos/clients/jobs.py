"""The jobs of the simulated users, with their expected results. Most use the fake trainer; a few train a tiny model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from harness.fake_trainer import BAD

_STAGE = {"n_epochs": 1, "batch_size": 8, "rank": 2}


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A training file, the body of the request, and the expected result, which goes into the client's log."""

    rows: bytes
    body: dict[str, Any]
    expect: dict[str, Any]


def fake_job(random: Random, name: str) -> JobRequest:
    steps, seed = random.randrange(6, 14), random.randrange(1000)
    rows = {
        "steps": steps,
        "step_seconds": random.choice((0.05, 0.1, 0.2)),
        "salt": name,
        "dies": random.random() < 0.04,
        "bad": random.random() < 0.03,
    }
    return JobRequest(
        rows=json.dumps({"fake_trainer": rows}).encode() + b"\n",
        body={"model": "tiny", "seed": seed},
        expect={
            "salt": name,
            "seed": seed,
            "steps": steps,
            "dies": rows["dies"],
            "bad": rows["bad"],
            "code": BAD,
        },
    )


def real_job(random: Random) -> JobRequest:
    """Returns the same training run each time: all must end with the same weights, with or without reused stages."""
    rows = [
        {"question": f"is {number} larger than {number * 7 % 24}", "answer": number > number * 7 % 24}
        for number in range(24)
    ]
    method = {"type": "heft", "heft": {"lora": _STAGE, "reft": {**_STAGE, "layers": [2]}}}
    return JobRequest(
        rows="".join(json.dumps(row) + "\n" for row in rows).encode(),
        body={
            "model": "tiny",
            "seed": 3,
            "method": method,
            "dtype": "float32",
            "max_length": 64,
            "reuse": random.random() < 0.3,
        },
        expect={"real": True},
    )
