"""Sampling of the next token from its logits: greedy or drawn, with random numbers of each request's own.

A request with a seed has a generator of its own, which draws one number a token. Where passes are batch-invariant
(heft_engine.model.batch_invariant) it gets the same tokens in any batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

#: Most likely tokens that top-p looks at before it sorts the whole vocabulary.
_TOP_P_CANDIDATES = 1_024
#: Smaller temperatures differ from 0 in nothing but that logits divided by them overflow.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """OpenAI's sampling parameters.

    temperature: 0 is greedy, and so is anything below MIN_TEMPERATURE.
    presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and for each occurrence.
    top_logprobs: number of alternatives with log-probabilities; None for no log-probabilities. They are the model's
        own, before temperature, penalties, biases and grammar.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def is_argmax(self) -> bool:
        """True if the token with the highest logit is all that is needed."""
        return self.temperature == 0 and self.top_logprobs is None and not self.adjusts_logits

    @property
    def adjusts_logits(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """A sampled token; with `top_logprobs` also its log-probability and the likeliest tokens with theirs.

    prompt: the prompt's tokens but the first, with theirs; in a request's first token, if it asks for them.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    prompt: tuple[SampledToken, ...] = ()


def log_probabilities(logits: Tensor, top: int) -> tuple[Tensor, tuple[tuple[int, float], ...]]:
    """Returns the log-probabilities of logits (vocabulary,), and the `top` likeliest tokens with theirs."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(min(top, len(logits)))
    return logprobs, tuple(zip(tokens.tolist(), values.tolist(), strict=True))


class Sampler:
    """Samples one sequence's tokens, one after another."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._counts: Counter[int] = Counter()

    def sample(self, logits: Tensor, *, unmasked: Tensor | None = None) -> SampledToken:
        """Returns the next token for float32 logits (vocabulary,). A token of -inf is never drawn.

        `unmasked` are the logits that log-probabilities are taken from, where some of `logits` are masked. A call that
        runs out of memory has changed nothing, and can be repeated.
        """
        row = logits.detach().cpu()
        adjusted = self._adjust(row) if self.params.adjusts_logits else row
        if self.params.top_logprobs is None:
            sampled = SampledToken(token=self._choose(adjusted))
        else:
            unadjusted = row if unmasked is None else unmasked.detach().cpu()
            logprobs, top_logprobs = log_probabilities(unadjusted, self.params.top_logprobs)
            token = self._choose(adjusted)
            sampled = SampledToken(token=token, logprob=float(logprobs[token]), top_logprobs=top_logprobs)
        self._counts[sampled.token] += 1
        return sampled

    def _choose(self, logits: Tensor) -> int:
        return self._draw(logits) if self.params.temperature > 0 else int(logits.argmax())

    def _adjust(self, logits: Tensor) -> Tensor:
        adjusted = logits.clone()
        for token, bias in self.params.logit_bias:
            if token < len(logits):
                adjusted[token] += bias
        for token, count in self._counts.items():
            adjusted[token] -= self.params.presence_penalty + count * self.params.frequency_penalty
        return adjusted

    def _draw(self, logits: Tensor) -> int:
        # Subtracting the maximum first keeps a tiny temperature from making infinities.
        probabilities = torch.softmax((logits - logits.max()) / self.params.temperature, dim=-1)
        if self.params.top_p >= 1:
            return self._inverse_cdf(probabilities)
        candidates, tokens = probabilities.topk(min(_TOP_P_CANDIDATES, len(probabilities)))
        if float(candidates.sum()) < self.params.top_p:
            candidates, tokens = probabilities.sort(descending=True)
        mass_before = candidates.cumsum(0) - candidates
        nucleus = max(1, int((mass_before < self.params.top_p).sum()))
        return int(tokens[self._inverse_cdf(candidates[:nucleus])])

    def _inverse_cdf(self, weights: Tensor) -> int:
        """Returns the first index at which the running sum of the weights passes a random share of their total.

        The number is drawn last: until then, whatever runs out of memory can be repeated.
        """
        cumulative = weights.double().cumsum(0)
        uniform = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        # The product may round up to the total: then it is the first index at which the sum has reached it.
        return index if index < len(weights) else int(cumulative.argmax())
