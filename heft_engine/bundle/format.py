"""The bundle: a fine-tuned model without its base model, as safetensors and JSON, with nothing that can be executed.

heft.json           format version, method, stages, base model, task, tokenizer hash, evaluation, parity, versions
lora/ lora-2/ …     LoRA for the ORIGINAL base model, one for each LoRA stage in order, each loadable by peft alone
reft/ reft-2/ …     intervention.safetensors + intervention.json
probe.safetensors   probe rows with their float32 scores, which loading checks
tokenizer/
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel as Schema
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.adapters.reft import KINDS, ReftIntervention
from heft_engine.adapters.registry import ADAPTERS
from heft_engine.config.train import BaseQuantization, InterventionKind, parse_positions
from heft_engine.data.encoding import Example, tokenizer_hash
from heft_engine.errors import BundleError, TrainingError
from heft_engine.model.interventions import PlacedIntervention

FORMAT = 1
MANIFEST = "heft.json"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


class BaseRecord(Schema):
    """The base model of a bundle: its reference, and the hash of its weights."""

    model_config = ConfigDict(extra="forbid")

    reference: str
    source: str
    revision: str | None
    model_type: str
    weights_sha256: str


class Ancestor(Schema):
    """A model that a bundle's run, or one before it, went on from.

    sha256: of its content (heft_engine.bundle.start). The bundle's first `stages` stages are its own; seed: of its run.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    sha256: str
    stages: int
    seed: int


class BundleInfo(Schema):
    """The content of heft.json. A bundle of a run that went on from another one holds the stages of both, in order."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    method: str
    stages: list[dict[str, Any]]  #: settings with nothing left on "auto", in order
    base_model: BaseRecord
    task: dict[str, Any]
    tokenizer_sha256: str
    dtype: str
    base_quantization: BaseQuantization | None = Field(default=None, exclude_if=lambda value: value is None)
    max_length: int
    seed: int
    max_new_tokens: int = 64  #: text tasks: default limit of an answer
    #: Probabilities are softmax(totals / temperature); 1 without validation rows to calibrate on
    #: (heft_engine.evaluation.calibration).
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    parity: list[dict[str, Any]] = []
    #: The models that its runs went on from, the oldest first.
    started_from: list[Ancestor] = Field(default=[], exclude_if=lambda value: not value)
    probe_tolerance: float = 0.0
    versions: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Rows with the finished model's float32 scores, answer by answer."""

    examples: list[Example]
    scores: list[tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class StoredIntervention:
    """An intervention on disk: its place, and R, W, b (those that its kind has) as plain matrices."""

    layer: int
    positions: str
    rank: int
    state: dict[str, Tensor]
    kind: InterventionKind = "loreft"

    def restore(self, hidden_size: int) -> PlacedIntervention:
        """Returns the intervention, frozen. Raises BundleError when it is damaged or for another hidden size."""
        intervention = self.module(hidden_size)
        return PlacedIntervention(layer=self.layer, positions=self.positions, intervention=intervention)

    def module(self, hidden_size: int) -> ReftIntervention:
        """Returns the intervention without its place. Raises BundleError like `restore`."""
        kind = KINDS[self.kind]
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        if shapes != kind.shapes(hidden_size, self.rank):
            raise BundleError(f"the intervention at layer {self.layer} is not for hidden size {hidden_size}")
        intervention = kind(hidden_size, self.rank, trainable=False)
        try:
            intervention.load_exported_state(self.state)
        except (TrainingError, RuntimeError) as error:
            raise BundleError(f"the intervention at layer {self.layer} is damaged: {error}") from error
        return intervention.eval()


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The content of a bundle's directory."""

    path: Path
    info: BundleInfo
    adapters: list[LoraWeights]
    interventions: list[StoredIntervention]
    probe: Probe


def package_versions(quantization: BaseQuantization | None = None) -> dict[str, str]:
    """Returns the versions of what computes; of bitsandbytes too where the base is quantised."""
    packages = [*_PACKAGES, *(["bitsandbytes"] if quantization else [])]
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_stages(
    path: Path,
    adapters: list[LoraWeights],
    interventions: list[PlacedIntervention],
    base_reference: str | None = None,
) -> None:
    """Writes adapters and interventions alone, under their names in a bundle."""
    path.mkdir(parents=True, exist_ok=True)
    for name, adapter in zip(_names("lora"), adapters, strict=False):
        adapter.save(path / name, base_reference)
    for name, placed in zip(_names("reft"), interventions, strict=False):
        _write_intervention(path / name, placed)


def read_stages(path: Path) -> tuple[list[LoraWeights], list[StoredIntervention]]:
    """Reads the files of `write_stages`. Raises BundleError."""
    adapters = [LoraWeights.load(path / name) for name in _present(path, "lora")]
    return adapters, [_read_intervention(path / name) for name in _present(path, "reft")]


def write_bundle(
    path: Path,
    info: BundleInfo,
    adapters: list[LoraWeights],
    interventions: list[PlacedIntervention],
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
) -> Bundle:
    """Writes a complete bundle into an empty or new directory and returns it as read back."""
    write_stages(path, adapters, interventions, info.base_model.reference)
    _write_probe(path / "probe.safetensors", probe)
    tokenizer.save_pretrained(path / "tokenizer")
    (path / MANIFEST).write_text(info.model_dump_json(indent=1))
    return read_bundle(path)


def read_info(path: Path) -> BundleInfo:
    """Reads a bundle's heft.json alone. Raises BundleError."""
    try:
        info = BundleInfo.model_validate_json((path / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        raise BundleError(f"{path.name} is no bundle: {error}") from error
    if info.format != FORMAT:
        raise BundleError(f"this bundle has format {info.format}; this version reads format {FORMAT}")
    return info


def read_bundle(path: Path) -> Bundle:
    """Reads and checks a bundle. Raises BundleError naming what is wrong with it."""
    info = read_info(path)
    adapters, interventions = read_stages(path)
    merged = [stage for stage in info.stages if is_merged(stage)]
    added = sum(len(layers) for layers in added_interventions(info.stages))
    if len(adapters) != len(merged) or len(interventions) != added:
        raise BundleError(
            f"this bundle should hold {len(merged)} adapters and {added} interventions; "
            f"it has {len(adapters)} and {len(interventions)}"
        )
    probe = _read_probe(path / "probe.safetensors")
    return Bundle(path=path, info=info, adapters=adapters, interventions=interventions, probe=probe)


def added_interventions(stages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Returns, for each stage of heft.json, the layers at which it added an intervention. A bundle's interventions are
    in this order. A stage that went on with an earlier stage's intervention added none. Raises BundleError.
    """
    places: set[tuple[Any, ...]] = set()
    added = []
    for stage in stages:
        layers = [] if is_merged(stage) else stage["layers"]
        settings = [stage.get("positions"), stage.get("rank"), stage.get("kind", "loreft")]
        is_new = stage.get("init") == "new"
        added.append([layer for layer in layers if is_new or (layer, *settings) not in places])
        places.update((layer, *settings) for layer in layers)
    return added


def is_merged(stage: Mapping[str, Any]) -> bool:
    """Returns whether a stage of heft.json left a merged adapter; otherwise interventions. Raises BundleError."""
    adapter = ADAPTERS.get(stage["type"])
    if adapter is None:
        raise BundleError(
            f"this bundle has a stage of type {stage['type']!r}, which this version does not know"
        )
    return adapter.merges


def check_tokenizer(info: BundleInfo, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises BundleError when a tokenizer is not the one the model was trained with."""
    if tokenizer_hash(tokenizer) != info.tokenizer_sha256:
        raise BundleError("the bundle's tokenizer is not the one its model was trained with")


def _names(kind: str) -> list[str]:
    return [kind, *(f"{kind}-{n}" for n in range(2, 1_001))]


def _present(path: Path, kind: str) -> list[str]:
    names = []
    for name in _names(kind):
        if not (path / name).is_dir():
            break
        names.append(name)
    return names


def _write_intervention(path: Path, placed: PlacedIntervention) -> None:
    path.mkdir()
    save_file(placed.intervention.export_state(), path / "intervention.safetensors")
    record = {
        "kind": placed.intervention.kind,
        "layer": placed.layer,
        "rank": placed.intervention.rank,
        "positions": placed.positions,
    }
    (path / "intervention.json").write_text(json.dumps(record, indent=1))


def _read_intervention(path: Path) -> StoredIntervention:
    try:
        record = json.loads((path / "intervention.json").read_text())
        kind = KINDS.get(record["kind"])
        if kind is None:
            raise BundleError(f"interventions of kind {record['kind']!r} are not known")
        state = load_file(path / "intervention.safetensors")
        layer, positions, rank = int(record["layer"]), str(record["positions"]), int(record["rank"])
        parse_positions(positions)
        if missing := kind.shapes(1, 1).keys() - state.keys():
            raise BundleError(f"the intervention in {path.name} has no {', '.join(sorted(missing))}")
        return StoredIntervention(layer=layer, positions=positions, rank=rank, state=state, kind=kind.kind)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise BundleError(f"the intervention in {path.name} can't be read: {error}") from error


def _write_probe(path: Path, probe: Probe) -> None:
    """Writes the ragged rows as flat tensors with lengths."""
    answers = [answer for example in probe.examples for answer in example.answers]
    tensors = {
        "prompts": torch.tensor([token for example in probe.examples for token in example.prompt]),
        "prompt_lengths": torch.tensor([len(example.prompt) for example in probe.examples]),
        "answers": torch.tensor([token for answer in answers for token in answer]),
        "answer_lengths": torch.tensor([len(answer) for answer in answers]),
        "answer_counts": torch.tensor([len(example.answers) for example in probe.examples]),
        "scores": torch.tensor([score for scores in probe.scores for score in scores], dtype=torch.float32),
    }
    save_file(tensors, path)


def _read_probe(path: Path) -> Probe:
    try:
        flat = {name: tensor.tolist() for name, tensor in load_file(path).items()}
        prompts, answers, scores = iter(flat["prompts"]), iter(flat["answers"]), iter(flat["scores"])
        lengths = iter(flat["answer_lengths"])
        examples, totals = [], []
        for prompt_length, count in zip(flat["prompt_lengths"], flat["answer_counts"], strict=True):
            prompt = tuple(next(prompts) for _ in range(prompt_length))
            branches = tuple(tuple(next(answers) for _ in range(next(lengths))) for _ in range(count))
            labels = tuple(str(i) for i in range(count))
            examples.append(Example(prompt=prompt, answers=branches, labels=labels, gold=None))
            totals.append(tuple(next(scores) for _ in range(count)))
        return Probe(examples=examples, scores=totals)
    except (OSError, KeyError, ValueError, RuntimeError, StopIteration, SafetensorError) as error:
        raise BundleError(f"the bundle's probe rows can't be read: {error}") from error
