"""From logits to a token: greedy or drawn, with every request's own random numbers.

A request that names a seed gets the same tokens whatever it is computed beside: its logits have the same bits, and its
random numbers come from a generator of its own, one a token. It does NOT know models or text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

#: The most likely tokens that are looked at before the whole vocabulary is sorted.
_LIKELY = 1_024


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen, in the words of OpenAI's API.

    temperature 0 takes the most likely token. The penalties are subtracted from the logits of tokens written so far:
    presence once, frequency for each time. top_logprobs: None for no log-probabilities, else how many tokens beside
    the chosen one; they are the model's own, before temperature, penalties and biases.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the chosen token is simply the one with the highest logit, and nothing else is asked."""
        return self.temperature == 0 and self.top_logprobs is None and not self.adjusts

    @property
    def adjusts(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """The chosen token; its log-probability and the likeliest tokens', if they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one sequence's tokens, one after another."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._written: Counter[int] = Counter()

    def choose(self, logits: Tensor) -> SampledToken:
        """From float32 logits (vocabulary,)."""
        row = logits.detach().cpu()
        adjusted = self._adjusted(row) if self.sampling.adjusts else row
        token = self._draw(adjusted) if self.sampling.temperature > 0 else int(adjusted.argmax())
        self._written[token] += 1
        if self.sampling.top_logprobs is None:
            return SampledToken(token=token)
        logprobs = torch.log_softmax(row, dim=-1)
        values, tokens = logprobs.topk(min(self.sampling.top_logprobs, len(row)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return SampledToken(token=token, logprob=float(logprobs[token]), top=top)

    def _adjusted(self, logits: Tensor) -> Tensor:
        changed = logits.clone()
        known = [(token, bias) for token, bias in self.sampling.logit_bias if token < len(logits)]
        for token, bias in known:
            changed[token] += bias
        for token, times in self._written.items():
            changed[token] -= self.sampling.presence_penalty + times * self.sampling.frequency_penalty
        return changed

    def _draw(self, logits: Tensor) -> int:
        chance = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        # The maximum goes first: a tiny temperature must not make infinities of the rest.
        weights = torch.softmax((logits - logits.max()) / self.sampling.temperature, dim=-1)
        if self.sampling.top_p >= 1:
            return _pick(weights, chance)
        likely, tokens = weights.topk(min(_LIKELY, len(weights)))
        if float(likely.sum()) < self.sampling.top_p:
            likely, tokens = weights.sort(descending=True)
        before = likely.cumsum(0) - likely
        kept = max(1, int((before < self.sampling.top_p).sum()))
        return int(tokens[_pick(likely[:kept], chance)])


def _pick(weights: Tensor, chance: float) -> int:
    """The index at which the running sum of the weights passes `chance` of their total."""
    running = weights.double().cumsum(0)
    index = int(torch.searchsorted(running, chance * running[-1], right=True))
    return min(index, len(weights) - 1)
