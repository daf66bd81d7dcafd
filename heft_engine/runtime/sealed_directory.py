"""Checkpoints on a local disk: a new directory each, files first, then a manifest with every file's SHA-256.

A directory without a manifest is no checkpoint. Everything is safetensors and JSON. It does NOT know what is in them
beyond tensors and JSON values, nor where they go afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heft_engine.errors import BundleError

MANIFEST = "manifest.json"
_TENSORS = "state.safetensors"
_VALUES = "state.json"


def save_state(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes JSON values and tensors; the torch random state goes along under its own name."""
    directory.mkdir(parents=True, exist_ok=True)
    everything = {**tensors, "rng": torch.get_rng_state()}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in everything.items()},
        directory / _TENSORS,
    )
    (directory / _VALUES).write_text(json.dumps(values, allow_nan=False))


def load_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_state` wrote. The random state is among the tensors: restore it last."""
    try:
        return json.loads((directory / _VALUES).read_text()), load_file(directory / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"checkpoint {directory.name} can't be read: {error}") from error


def seal(directory: Path) -> dict[str, str]:
    """Makes a directory's files durable and writes its manifest last. Returns {relative path: sha256}."""
    hashes = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as file:
            hashes[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    partial = directory / (MANIFEST + ".partial")
    with partial.open("w") as out:
        json.dump(hashes, out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(directory / MANIFEST)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return hashes


def verify(directory: Path) -> None:
    """Raises BundleError unless every file is as its manifest says."""
    try:
        hashes = json.loads((directory / MANIFEST).read_text())
        for name, digest in hashes.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise BundleError(
                        f"checkpoint {directory.name} is damaged: {name} is not what was written"
                    )
    except (OSError, ValueError) as error:
        raise BundleError(f"checkpoint {directory.name} is incomplete: {error}") from error


def prune(parent: Path, keep: int, *, kept: str, ours: str) -> None:
    """Removes all but the `keep` last sealed directories whose names fit `kept`, and unsealed leftovers among `ours`.

    Nothing else in the folder is touched: it may be anybody's. A resumed run may write lower steps than are there.
    """
    sealed = [path for path in parent.glob(kept) if (path / MANIFEST).exists()]
    sealed.sort(key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))
    leftovers = [path for path in parent.glob(ours) if path.is_dir() and not (path / MANIFEST).exists()]
    for path in [*sealed[:-keep], *leftovers]:
        shutil.rmtree(path)
