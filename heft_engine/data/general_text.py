"""General text to measure forgetting: a fine-tuned model's loss on text unrelated to its task.

Python's topic documentation (465 kB in every installation) is divided into pieces. The first half of a piece is its
prompt and the second half is supervised, so that interventions act as in serving.
"""

from __future__ import annotations

from pydoc_data.topics import topics

from heft_engine.data.encoding import Encoder, Example
from heft_engine.errors import ConfigError

PIECES = 8
PIECE_TOKENS = 256
MIN_SUPERVISED_TOKENS = 4


def general_examples(encoder: Encoder, text: str | None = None) -> list[Example]:
    """Returns PIECES examples of PIECE_TOKENS tokens each, the same for every run with this tokenizer.

    `text` replaces Python's documentation. Raises ConfigError if it is too short.
    """
    if text is None:
        text = "\n".join(topics[name] for name in sorted(topics))
    size = min(PIECE_TOKENS, encoder.max_length)
    stride = len(text) // PIECES
    examples = []
    for index in range(PIECES):
        # No tokenizer has more than eight characters a token in English.
        ids = encoder.text(text[index * stride : index * stride + min(8 * size, stride)])[:size]
        half = len(ids) // 2
        if half < MIN_SUPERVISED_TOKENS:
            raise ConfigError(f"the text is too short for {PIECES} pieces", param="general")
        examples.append(Example(prompt=tuple(ids[:half]), answers=(tuple(ids[half:]),), labels=("",), gold=0))
    return examples
