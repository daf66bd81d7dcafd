"""Checks of the tiny models: the family of each, and the tokens that other tests rely on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import FAMILIES
from transformers import AutoConfig, AutoTokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_saved_with_its_own_type(make_tiny_model: Callable[[str], Path], family: str) -> None:
    config = AutoConfig.from_pretrained(make_tiny_model(family))
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == (family, 4, 600)


def test_label_words_are_single_tokens(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    yes, no = (tokenizer.encode(word, add_special_tokens=False) for word in (" yes", " no"))
    assert len(yes) == len(no) == 1
    assert yes != no
