"""Sampling: each setting against its definition."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from heft_engine.inference.sampling import Sampler, SamplingParams

#: Probabilities 0.5, 0.3, 0.15, 0.05, in no order.
LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
DRAWS = 4_000


def shares(**settings: float) -> list[float]:
    sampler = Sampler(SamplingParams(seed=1, **settings))  # type: ignore[arg-type]
    drawn = Counter(sampler.sample(LOGITS).token for _ in range(DRAWS))
    return [drawn[token] / DRAWS for token in range(4)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        ({"temperature": 1.0, "top_p": 0.79}, [0, 0.625, 0, 0.375]),
        ({"temperature": 1.0, "top_p": 0.81}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 1e-5}, [0, 1, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"temperature": 1e-100}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_draws_have_their_shares(settings: dict[str, float], expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / DRAWS))


def test_top_p_looks_beyond_the_likeliest_tokens() -> None:
    """A vocabulary so flat that a nucleus of 0.9 holds 4,500 tokens."""
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=0))
    logits = torch.zeros(5_000)
    assert len({sampler.sample(logits).token for _ in range(1_000)}) > 850


def test_a_seed_repeats_and_none_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.sample(LOGITS).token for _ in range(40)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_penalties_count_what_was_written() -> None:
    """Gaps between the likeliest tokens are 0.51 and 0.69."""
    presence = Sampler(SamplingParams(presence_penalty=0.6))
    assert [presence.sample(LOGITS).token for _ in range(3)] == [1, 3, 1]
    frequency = Sampler(SamplingParams(frequency_penalty=0.6))
    assert [frequency.sample(LOGITS).token for _ in range(6)] == [1, 3, 1, 3, 1, 0]
    biased = Sampler(SamplingParams(logit_bias=((2, 100.0), (99, 100.0))))
    assert biased.sample(LOGITS).token == 2


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(SamplingParams(temperature=0.1, top_logprobs=2, logit_bias=((2, 100.0),)))
    choice = sampler.sample(LOGITS)
    assert choice.token == 2
    assert choice.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert [token for token, _ in choice.top_logprobs] == [1, 3]
    assert [value for _, value in choice.top_logprobs] == pytest.approx(
        [math.log(0.5), math.log(0.3)], abs=1e-6
    )
    assert Sampler(SamplingParams()).sample(LOGITS).logprob is None
