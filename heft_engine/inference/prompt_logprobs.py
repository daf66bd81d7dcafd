"""Log-probabilities of a prompt's own tokens, each given those before it: what `echo` with `logprobs` answers."""

from __future__ import annotations

from torch import Tensor

from heft_engine.inference.sampling import SampledToken
from heft_engine.model.packed_lm import PackedLM
from heft_engine.runtime.transfers import index_tensor

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
        logprobs = lm.exact_logits(lm.finish(states[None, start:end])[0]).log_softmax(dim=-1)
        following = prompt[start + 1 : end + 1]
        of_prompt = logprobs.gather(1, index_tensor(following, logprobs.device)[:, None])[:, 0].tolist()
        values, likeliest = (part.tolist() for part in logprobs.topk(min(top, logprobs.shape[1]), dim=-1))
        tokens += [
            SampledToken(token=token, logprob=logprob, top_logprobs=tuple(zip(row_tokens, row, strict=True)))
            for token, logprob, row_tokens, row in zip(following, of_prompt, likeliest, values, strict=True)
        ]
    return tuple(tokens)
