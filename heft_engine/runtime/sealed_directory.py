"""Sealed directories: files first, then a manifest with the SHA-256 of every file. Without one, it is incomplete.

Checkpoints and cached stages are such directories; their contents are safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from heft_engine.errors import BundleError
from heft_engine.runtime.random_state import RandomState

MANIFEST = "manifest.json"
_TENSORS = "state.safetensors"
_VALUES = "state.json"


def save_state(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes JSON values and tensors, and adds torch's random state to the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    with_rng = {**tensors, **RandomState.current().to_tensors()}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in with_rng.items()},
        directory / _TENSORS,
    )
    (directory / _VALUES).write_text(json.dumps(values, allow_nan=False))


def load_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the values and tensors of `save_state`. Restore the random state, among the tensors, last.

    Raises BundleError if they can't be read.
    """
    try:
        return json.loads((directory / _VALUES).read_text()), load_file(directory / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"checkpoint {directory.name} can't be read: {error}") from error


def seal(directory: Path) -> dict[str, str]:
    """Syncs a directory's files to disk, then writes its manifest. Returns {relative path: sha256}."""
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
    """Raises BundleError unless every file has the hash in the manifest."""
    try:
        hashes = json.loads((directory / MANIFEST).read_text())
        for name, digest in hashes.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise BundleError(
                        f"checkpoint {directory.name} is damaged: {name} does not have the SHA-256 of its manifest"
                    )
    except (OSError, ValueError) as error:
        raise BundleError(f"checkpoint {directory.name} is incomplete: {error}") from error


def prune(parent: Path, keep: int, *, sealed: str, unsealed: str) -> None:
    """Removes sealed directories that match the glob `sealed`, all but the `keep` newest, and those that match
    `unsealed` and have no manifest.

    Nothing else in `parent` is touched. Age is the manifest's time: a resumed run may write lower steps than exist.
    """
    complete = [path for path in parent.glob(sealed) if (path / MANIFEST).exists()]
    complete.sort(key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))
    incomplete = [path for path in parent.glob(unsealed) if path.is_dir() and not (path / MANIFEST).exists()]
    for path in [*complete[:-keep], *incomplete]:
        shutil.rmtree(path)
