"""The baselines: pyreft's `generate`, one row at a time, and a forward pass of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving.synthetic import LAYER, RANK
from heft_engine.data.encoding import Example
from heft_engine.model.base_models import load_tokenizer


class Pyreft:
    """A merged model with an intervention, used as in pyreft's documentation: one new token for each row."""

    def __init__(self, model: Any, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pyreft
        config = pyreft.ReftConfig(
            representations={
                "layer": LAYER,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=model.config.hidden_size, low_rank_dimension=RANK, dtype=model.dtype
                ),
            }
        )
        self._model = pyreft.get_reft_model(model, config)
        self._pad = load_tokenizer(path).eos_token_id

    def answer(self, examples: Sequence[Example]) -> None:
        for example in examples:
            ids = torch.tensor([example.prompt])
            self._model.generate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                unit_locations={"sources->base": (None, [[[len(example.prompt) - 1]]])},
                intervene_on_prompt=True,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=self._pad,
            )


class Plain:
    """A forward pass for each row, without intervention."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self._model(torch.tensor([example.prompt]), use_cache=False, logits_to_keep=1)
