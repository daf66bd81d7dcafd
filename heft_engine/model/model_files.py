"""A directory of model files, judged before a byte of it is used: config, weights, size, hash.

A config from a stranger can name code to run (`auto_map`), a kernel to download (`_attn_implementation`) or
files elsewhere, and `trust_remote_code=False` has been got round more than once. So a config is never handed
to transformers as it is: the family comes from the fixed table in `heft_engine.model.families`, and of its fields
only those that the family's own config class declares are kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from heft_engine.errors import ModelError
from heft_engine.model.families import FAMILIES

#: Older names of declared fields, which the config classes still translate.
_LEGACY_FIELDS = {
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
    *("rotary_pct", "rotary_emb_base", "sliding_window_pattern"),
}
_MAX_JSON_BYTES = 64 * 1024**2
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
UNSUPPORTED = "unsupported_model"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about a model that need no weights. `parameters` counts tied weights once."""

    model_type: str
    n_layers: int
    hidden_size: int
    parameters: int
    vocab_size: int
    max_position_embeddings: int


def inspect(path: Path) -> ModelInfo:
    """Judge a model directory from its config and the headers of its weights. Raises ModelError."""
    config = read_config(path)
    return ModelInfo(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        parameters=sum(_stored_parameters(file) for file in weight_files(path)),
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
    )


def read_config(path: Path) -> transformers.PreTrainedConfig:
    """The config of the family's own class, holding declared fields only. Raises ModelError."""
    raw = _read_json(path / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"{path.name} is of type {model_type!r}; the supported families are {', '.join(FAMILIES)}",
            code=UNSUPPORTED,
        )
    _refuse_untrusted(path, raw)
    config_class = transformers.CONFIG_MAPPING[model_type]
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    declared = {field.name for field in fields(config_class) if field.init} - common | _LEGACY_FIELDS
    try:
        return config_class(**{name: value for name, value in raw.items() if name in declared})
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"config.json of {path.name} is no valid {model_type} configuration: {error.__cause__ or error}",
            code=UNSUPPORTED,
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted by name. Raises ModelError if there are none."""
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    if not (path / _WEIGHTS_INDEX).is_file():
        raise ModelError(
            f"{path.name} has no {_WEIGHTS}: weights are read as safetensors, never as a pickle (.bin, .pt)",
            code=UNSUPPORTED,
        )
    weight_map = _read_json(path / _WEIGHTS_INDEX).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or not all(_is_plain_weight_name(name) for name in names):
        raise ModelError(
            f"{_WEIGHTS_INDEX} of {path.name} must name safetensors files beside it", code=UNSUPPORTED
        )
    if missing := sorted(name for name in names if not (path / name).is_file()):
        raise ModelError(f"{path.name} is incomplete: {', '.join(missing)} missing", code=UNSUPPORTED)
    return [path / name for name in sorted(names)]


def weights_hash(path: Path) -> str:
    """SHA-256, in hex, over names and contents of the weight files; computed once per file, size and time."""
    total = hashlib.sha256()
    for file in weight_files(path):
        status = file.stat()
        digest = _file_hash(file.resolve(), status.st_size, status.st_mtime_ns)
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {} where there is none. Raises ModelError if it asks for code of its own."""
    file = path / "tokenizer_config.json"
    settings = _read_json(file) if file.is_file() else {}
    if "auto_map" in settings:
        raise ModelError(f"the tokenizer of {path.name} needs code of its own (auto_map)", code=UNSUPPORTED)
    return settings


def _refuse_untrusted(path: Path, raw: dict[str, Any]) -> None:
    reasons = {
        "auto_map": "needs code of its own (auto_map), which is never run",
        "trust_remote_code": "needs code of its own (trust_remote_code), which is never run",
        "quantization_config": "holds quantised weights; take the original: merges need full precision",
    }
    for name, reason in reasons.items():
        if raw.get(name):
            raise ModelError(f"{path.name} {reason}", code=UNSUPPORTED)
    # transformers would attach such an adapter by itself and train on top of it.
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path.name} is an adapter; name its base model instead", code=UNSUPPORTED)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{file.name} of {file.parent.name} is larger than 64 MiB", code=UNSUPPORTED)
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{file.parent.name} is no model: it has no {file.name}", code=UNSUPPORTED
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file.name} of {file.parent.name} is not valid JSON", code=UNSUPPORTED) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} of {file.parent.name} is not a JSON object", code=UNSUPPORTED)
    return content


def _is_plain_weight_name(name: object) -> bool:
    return isinstance(name, str) and PurePosixPath(name).name == name and name.endswith(".safetensors")


def _stored_parameters(file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file.name} is no valid safetensors file: {error}", code=UNSUPPORTED) from error


@lru_cache(maxsize=64)
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """Size and time are part of the cache's key only: a file that was replaced is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
