"""Jobs that users make, and what each must come to. Most are for the stand-in; a few train a tiny model for real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from harness.stand_in import BAD

_STAGE = {"n_epochs": 1, "batch_size": 8, "rank": 2}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """`expect` goes into the client's log: what the job's model must hold, if it is known beforehand."""

    rows: bytes
    body: dict[str, Any]
    expect: dict[str, Any]


def stand_in_job(random: Random, name: str) -> Wanted:
    steps, seed = random.randrange(6, 14), random.randrange(1000)
    rows = {
        "steps": steps,
        "step_seconds": random.choice((0.05, 0.1, 0.2)),
        "salt": name,
        "dies": random.random() < 0.04,
        "bad": random.random() < 0.03,
    }
    return Wanted(
        rows=json.dumps({"stand_in": rows}).encode() + b"\n",
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


def real_job(random: Random) -> Wanted:
    """Equal for all: every one of them must end with the same weights, whether it reuses what others have trained."""
    rows = [
        {"question": f"is {number} larger than {number * 7 % 24}", "answer": number > number * 7 % 24}
        for number in range(24)
    ]
    method = {"type": "heft", "heft": {"lora": _STAGE, "reft": {**_STAGE, "layers": [2]}}}
    return Wanted(
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
