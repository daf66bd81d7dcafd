"""A fine-tuned model that a run goes on from: its bundle, the settings that the run takes over from it, its ancestry.

The run trains its stages on the bundle's base with the bundle's stages in place. Its own bundle holds all of them, and
needs this one no more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from heft_engine.bundle.content import adapter_content, tensor_hashes
from heft_engine.bundle.format import MANIFEST, Ancestor, Bundle, BundleInfo, check_tokenizer, read_bundle
from heft_engine.config.train import TrainConfig
from heft_engine.data.task import Task
from heft_engine.errors import ConfigError


@dataclass(frozen=True)
class StartModel:
    """The fine-tuned model of a run's `model`. name: the bundle's path, or the model's id in a service."""

    name: str
    bundle: Bundle

    @property
    def info(self) -> BundleInfo:
        return self.bundle.info

    @property
    def task(self) -> Task:
        return Task.from_json(self.info.task)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of all that the model computes by: its base, its stages, and their trained tensors."""
        interventions = [
            [placed.layer, placed.positions, placed.rank, placed.kind, tensor_hashes(placed.state)]
            for placed in self.bundle.interventions
        ]
        content = [
            self.info.base_model.weights_sha256,
            self.info.base_quantization,
            self.info.stages,
            [adapter_content(adapter) for adapter in self.bundle.adapters],
            interventions,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def ancestry(self) -> list[Ancestor]:
        """The models before a run that goes on from this one, the oldest first."""
        record = Ancestor(
            model=self.name, sha256=self.sha256, stages=len(self.info.stages), seed=self.info.seed
        )
        return [*self.info.started_from, record]

    def inherit(self, config: TrainConfig) -> TrainConfig:
        """Returns a run's settings with those that it takes over: dtype, base_quantization, and max_length if unset.

        Raises ConfigError for a dtype or a base_quantization that is not the model's, and for compile on a base in 4
        bits.
        """
        info = self.info
        if config.dtype not in ("auto", info.dtype):
            message = f"{self.name} was trained in {info.dtype}: dtype must be auto or {info.dtype}"
            raise ConfigError(message, param="dtype")
        if config.base_quantization not in (None, info.base_quantization):
            message = f"{self.name} was not trained on a base in {config.base_quantization}: leave it out"
            raise ConfigError(message, param="base_quantization")
        if info.base_quantization is not None and config.compile is True:
            message = f"{self.name} has a base in 4 bits, whose layers run uncompiled: leave compile out"
            raise ConfigError(message, param="compile")
        inherited = {
            "dtype": info.dtype,
            "base_quantization": info.base_quantization,
            "max_length": config.max_length or info.max_length,
        }
        return config.model_copy(update=inherited)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises BundleError unless the base's tokenizer is the one that the model was trained with."""
        check_tokenizer(self.info, tokenizer)


def read_start(model: str, path: Path | None, *, allow_paths: bool) -> StartModel | None:
    """Returns the model that a run goes on from; None where `model` is a base.

    path: of its bundle; None: `model` is a path itself, if `allow_paths`. Raises BundleError for a damaged bundle.
    """
    path = start_path(model, path, allow_paths=allow_paths)
    return None if path is None else StartModel(model, read_bundle(path))


def start_path(model: str, path: Path | None, *, allow_paths: bool) -> Path | None:
    """Returns the path of the bundle that `read_start` reads."""
    if path is None and allow_paths and (Path(model).expanduser() / MANIFEST).is_file():
        return Path(model).expanduser()
    return path
