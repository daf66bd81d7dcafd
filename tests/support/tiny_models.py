"""Tiny random language models for tests, in every family the engine knows, made from configs in a second.

`chat_tokenizer(path, family)` has the special tokens and the chat template of a family.
Fixtures: `tiny_llama_dir` (one directory a session) and `make_tiny_model(family)` (each made once).
torch is imported inside the functions, so that tests of the API can be collected without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

#: The chat templates of the families, by name.
CHAT_TEMPLATES = Path(__file__).with_name("chat_templates")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox")
VOCAB_SIZE = 600
#: Text that is the same wherever the tests run: Python's own documentation changes with its version.
ENGLISH = (Path(__file__).parents[2] / "LICENSE").read_text()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Wide enough for weights of a visible size: at the usual 0.02 every mistake would vanish in the tolerance.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
_WINDOW = 16
#: What each family has of its own: grouped heads, a sliding window (on some layers or on all), soft caps.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": _WINDOW},
    "qwen2": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_GROUPED,
        "sliding_window": _WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    "gpt_neox": {},
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "gpt_neox": "GPTNeoX",
}


@cache
def _tokenizer_json() -> str:
    """A byte-level BPE of VOCAB_SIZE tokens, in which " yes" and " no" are one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [
        "Question: is it so?\nAnswer: yes",
        "Question: is it so?\nAnswer: no",
        " true false user assistant",
    ]
    tokenizer.train_from_iterator([ENGLISH, *(words * 400)], trainer)
    return tokenizer.to_str()


def save_tokenizer(path: Path) -> None:
    """Writes the tiny tokenizer into `path`, as transformers reads it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json())
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "</s>",
                "model_max_length": 512,
            }
        )
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class ChatFamily:
    """A family's special tokens, its end of a turn among them, and how it writes a call of `weather` for Rome."""

    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    end: str = "<|im_end|>"
    format: str | None = "hermes"
    template: Path | None = None  #: None: the file of the family's name in CHAT_TEMPLATES
    call: str = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    parallel: bool = True


CHAT_FAMILIES = {
    "hermes": ChatFamily(),
    "qwen2": ChatFamily(),
    "smollm2": ChatFamily(
        template=Path(__file__).parents[2] / "heft_engine/model/smollm2_chat_template.jinja"
    ),
    "qwen3": ChatFamily(),
    "llama3": ChatFamily(
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        end="<|eot_id|>",
        format="llama3_json",
        call='{"name": "weather", "parameters": {"city": "Rome"}}',
        parallel=False,
    ),
    "mistral": ChatFamily(
        special=(
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        end="</s>",
        format="mistral",
        call='[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "VvvODy9mT"}]',
    ),
    "gemma": ChatFamily(special=("<start_of_turn>", "<end_of_turn>"), end="<end_of_turn>", format=None),
}
#: The families whose templates render tools.
TOOL_FAMILIES = tuple(name for name, family in CHAT_FAMILIES.items() if family.format is not None)


def save_chat_tokenizer(path: Path, name: str) -> Path:
    """Writes the tiny tokenizer with a family's special tokens and chat template into `path`."""
    from transformers import AutoTokenizer

    save_tokenizer(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(CHAT_FAMILIES[name].special), special_tokens=True)
    tokenizer.save_pretrained(path)
    template = CHAT_FAMILIES[name].template or CHAT_TEMPLATES / f"{name}.jinja"
    shutil.copy(template, path / "chat_template.jinja")
    return path


def chat_tokenizer(path: Path, name: str) -> Any:
    """Returns a family's tokenizer, written into `path`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_chat_tokenizer(path, name))


def tiny_config(family: str, **changes: Any) -> Any:
    """Returns the configuration of a tiny model of `family`, with changed fields."""
    import transformers

    name = _CLASSES[family]
    config_class = getattr(transformers, f"{'Gemma3Text' if name == 'Gemma3' else name}Config")
    return config_class(**{**_SIZES, **_OWN[family], **changes})


def save_tiny_model(
    path: Path, family: str = "llama", *, layers: int = 4, seed: int = 0, **sizes: int
) -> Path:
    """Writes a random model of `family` and its tokenizer into `path`: about 60,000 parameters, float32.

    `sizes`: changed fields of its configuration.
    """
    import torch
    import transformers

    config = tiny_config(family, num_hidden_layers=layers, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")(config)
    save_tokenizer(path)
    model.save_pretrained(path)
    return path


def save_chat_model(path: Path, name: str) -> Path:
    """Writes a tiny Llama with the chat template and the special tokens of a family into `path`."""
    vocab_size = VOCAB_SIZE + len(CHAT_FAMILIES[name].special)
    save_tiny_model(path, layers=2, vocab_size=vocab_size, max_position_embeddings=2_048)
    return save_chat_tokenizer(path, name)


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make_tiny_model("qwen3")` → a directory as the hub would hold it, made once a session."""
    root = tmp_path_factory.mktemp("tiny-models")

    @cache
    def make(family: str) -> Path:
        return save_tiny_model(root / family, family)

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(make_tiny_model: Callable[[str], Path]) -> Path:
    """A directory with a tiny random Llama, read-only for tests: copy it to change it."""
    return make_tiny_model("llama")
