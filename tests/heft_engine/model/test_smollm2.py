"""The real SmolLM2-135M-Instruct, converted from its package: an ordinary model that knows a capital."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from heft_engine.model import smollm2
from heft_engine.model.base_models import load_model, load_tokenizer, resolve
from heft_engine.model.model_files import inspect, weights_hash

pytestmark = pytest.mark.slow


def test_the_alias_becomes_an_ordinary_model(tmp_path: Path) -> None:
    base = resolve("smollm2-135m", cache_dir=tmp_path)
    info = inspect(base.path)
    assert (info.model_type, info.n_layers, info.hidden_size, info.parameters) == (
        "llama",
        30,
        576,
        134_515_008,
    )
    tokenizer = load_tokenizer(base.path)
    assert tokenizer("In 1998")["input_ids"] == [788, 216, 33, 41, 41, 40]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = load_model(base, dtype=torch.float32)
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "The capital of France is Paris." in tokenizer.decode(written)

    digest = weights_hash(base.path)
    began = time.monotonic()
    assert resolve("smollm2-135m", cache_dir=tmp_path) == base
    assert weights_hash(base.path) == digest
    assert time.monotonic() - began < 5, "the second time nothing is converted or hashed again"


def test_the_chat_template_differs_from_the_packages_own_for_tools_alone(tmp_path: Path) -> None:
    base = resolve("smollm2-135m", cache_dir=tmp_path)
    gguf = smollm2._gguf_file()
    packaged = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = load_tokenizer(base.path)
    user = {"role": "user", "content": " hi "}
    for conversation in (
        [user],
        [{"role": "system", "content": "Be brief."}, user],
        [user, {"role": "assistant", "content": "yes"}, user],
    ):
        for generation in (True, False):
            settings: dict[str, bool] = {"tokenize": False, "add_generation_prompt": generation}
            ours = tokenizer.apply_chat_template(conversation, **settings)
            assert ours == packaged.apply_chat_template(conversation, **settings)
