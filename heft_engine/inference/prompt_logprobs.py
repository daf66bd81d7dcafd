"""Log-probabilities of a prompt's own tokens, each given those before it: what `echo` with `logprobs` answers."""

from __future__ import annotations

from torch import Tensor

from heft_engine.inference.sampling import SampledToken, log_probabilities
from heft_engine.model.packed_lm import PackedLM

#: Positions whose logits are there at a time.
_CHUNK = 128


def prompt_logprobs(
    lm: PackedLM, states: Tensor, prompt: tuple[int, ...], top: int
) -> tuple[SampledToken, ...]:
    """Returns the tokens of a prompt but the first, with the `top` likeliest ones in the place of each.

    states: (tokens, hidden) after the last layer, of at least the prompt's tokens. The head is multiplied in float32,
    as for scores of answers: the numbers are summed up and compared.
    """
    tokens: list[SampledToken] = []
    for start in range(0, len(prompt) - 1, _CHUNK):
        end = min(start + _CHUNK, len(prompt) - 1)
        logits = lm.exact_logits(lm.finish(states[None, start:end])[0])
        for row, token in zip(logits.cpu(), prompt[start + 1 : end + 1], strict=True):
            logprobs, top_logprobs = log_probabilities(row, top)
            tokens.append(
                SampledToken(token=token, logprob=float(logprobs[token]), top_logprobs=top_logprobs)
            )
    return tuple(tokens)
