"""Rows from a dataset on the Hugging Face hub: `hub:<org>/<name>[:<config>][:<split>]`.

A dataset's card may name files anywhere, on this machine or on another (`datasets` asked such an address before
it refused), and readers that unpickle. So the card is judged first, then the files that are to be read: JSON, CSV
or Parquet of that very repository.
It does NOT know the hub's address and token: the hub's own libraries take them from HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets.exceptions import DatasetBuildError, DatasetNotFoundError
from huggingface_hub import DatasetCard, DatasetInfo, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from heft_engine.config.known_datasets import DatasetError, parse_reference
from heft_engine.data.hub_rows import reader_of
from heft_engine.errors import EngineError, RowError

_READERS = {f"datasets.packaged_modules.{name}.{name}" for name in ("json", "csv", "parquet")}


class HubDataError(EngineError):
    """A dataset that can't be found, read or understood."""

    code = "dataset_not_found"


def load_hub_rows(
    reference: str, file: str = "training_file", *, cache_dir: Path | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as `heft_engine.data.rows` reads them, for this one of a job's files.

    Downloads it into `cache_dir` (None: the user's own cache). Raises HubDataError (dataset_not_found,
    dataset_access_denied, hub_unavailable) and RowError when its columns fit none of the formats.
    """
    try:
        where = parse_reference(reference, file)
    except DatasetError as fault:
        raise HubDataError(str(fault)) from fault
    assert where.split is not None
    data = _load(where.repository, where.config, where.split, cache_dir)
    to_row = reader_of(where, data.column_names)
    for line, fields in enumerate(data, start=1):
        try:
            yield to_row(fields)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise RowError(f"row {line} of {reference} is not like the others: {error}", line=line) from error


def _load(repository: str, config: str | None, split: str, cache_dir: Path | None) -> datasets.Dataset:
    try:
        hub = HfApi()
        # Asked here because `datasets` says of a gated repository that it does not exist.
        hub.auth_check(repository, repo_type="dataset")
        info = hub.dataset_info(repository)
        _refuse_untrusted_card(repository, info, hub)
        # A pinned revision also keeps `datasets` from asking a second server for a converted copy.
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{repository}",
            config,
            revision=info.sha,
            cache_dir=str(cache_dir / "datasets") if cache_dir else None,
        )
        _refuse_untrusted_files(repository, builder)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except GatedRepoError as error:
        message = f"{repository} is gated: accept its terms on the hub and set HF_TOKEN for the workers"
        raise HubDataError(message, code="dataset_access_denied") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, DatasetNotFoundError) as error:
        raise HubDataError(f"the hub has no dataset {repository}, or it is private") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise HubDataError(
            f"the hub can't be reached for {repository}: {error}", code="hub_unavailable"
        ) from error
    except (FileNotFoundError, DatasetBuildError, ValueError, RuntimeError) as error:
        # Among these: a config or a split that is not there, with the names of those that are.
        raise HubDataError(f"{repository} can't be read: {str(error)[:500]}") from error


def _refuse_untrusted_card(repository: str, info: DatasetInfo, hub: HfApi) -> None:
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if ".huggingface.yaml" in names:
        raise HubDataError(f"{repository} has a .huggingface.yaml, which is not supported")
    if "README.md" not in names:
        return
    path = hub.hf_hub_download(repository, "README.md", repo_type="dataset", revision=info.sha)
    card = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict()
    for text in _strings(card.get("configs")):
        if "://" in text or text.startswith(("/", "~")) or ".." in PurePosixPath(text).parts:
            raise HubDataError(f"{repository} names a file outside itself: {text}")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _refuse_untrusted_files(repository: str, builder: datasets.DatasetBuilder) -> None:
    if type(builder).__module__ not in _READERS:
        raise HubDataError(f"{repository} holds other files than JSON, CSV or Parquet")
    own = f"hf://datasets/{repository}@"
    files = [str(file) for of_split in (builder.config.data_files or {}).values() for file in of_split]
    if strangers := [file for file in files if not file.startswith(own) or ".." in file]:
        raise HubDataError(f"{repository} names a file outside itself: {strangers[0]}")
