"""General text that the task never saw: what a fine-tuned model forgets shows in its loss here.

Python's own documentation of its topics (465 kB in every installation) is cut into pieces; the first half of a piece
is its prompt, the second half is supervised, so that interventions act as they do in serving.
"""

from __future__ import annotations

from pydoc_data.topics import topics

from heft_engine.data.encoding import Encoder, Example
from heft_engine.errors import ConfigError

PIECES = 8
PIECE_TOKENS = 256
#: Supervised tokens that a piece must have.
LEAST_HALF = 4


def general_examples(encoder: Encoder, text: str | None = None) -> list[Example]:
    """PIECES examples of PIECE_TOKENS tokens each, the same for every run with this tokenizer.

    `text` takes the place of Python's documentation. Raises ConfigError when there is too little of it.
    """
    if text is None:
        text = "\n".join(topics[name] for name in sorted(topics))
    size = min(PIECE_TOKENS, encoder.max_length)
    stride = len(text) // PIECES
    examples = []
    for index in range(PIECES):
        # Eight characters a token is more than any tokenizer makes of English.
        ids = encoder.text(text[index * stride : index * stride + min(8 * size, stride)])[:size]
        half = len(ids) // 2
        if half < LEAST_HALF:
            raise ConfigError(f"the text is too short to be cut into {PIECES} pieces", param="general")
        examples.append(Example(prompt=tuple(ids[:half]), answers=(tuple(ids[half:]),), labels=("",), gold=0))
    return examples
