"""Rows of a dataset on the Hugging Face hub: `hub:<org>/<name>[:<config>][:<split>]`.

A dataset's card can name files on this machine or on other hosts (which `datasets` contacts before it refuses them) and
readers that unpickle. The card is therefore checked first, then the files: only JSON, CSV and Parquet files of the
repository itself are read. The hub's libraries take its address and token from HF_ENDPOINT and HF_TOKEN.
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
from heft_engine.data.hub_rows import row_converter
from heft_engine.errors import EngineError, RowError

_READERS = {f"datasets.packaged_modules.{name}.{name}" for name in ("json", "csv", "parquet")}


class HubDataError(EngineError):
    """A dataset that can't be found or read."""

    code = "dataset_not_found"


def load_hub_rows(
    reference: str, file: str = "training_file", *, cache_dir: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yields a dataset's rows in the formats of heft_engine.data.rows; `file` is the job's field that names it.

    Downloads it into `cache_dir` (None: the user's cache). Raises HubDataError (dataset_not_found,
    dataset_access_denied, hub_unavailable), and RowError if its columns fit no format.
    """
    try:
        dataset = parse_reference(reference, file)
    except DatasetError as fault:
        raise HubDataError(str(fault)) from fault
    assert dataset.split is not None
    data = _load(dataset.repository, dataset.config, dataset.split, cache_dir)
    convert = row_converter(dataset, data.column_names)
    for line, fields in enumerate(data, start=1):
        try:
            yield convert(fields)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise RowError(f"row {line} of {reference} can't be converted: {error}", line=line) from error


def _load(repository: str, config: str | None, split: str, cache_dir: Path | None) -> datasets.Dataset:
    try:
        hub = HfApi()
        # `datasets` would report a gated repository as missing.
        hub.auth_check(repository, repo_type="dataset")
        info = hub.dataset_info(repository)
        _refuse_untrusted_card(repository, info, hub)
        # With a pinned revision `datasets` does not ask a second server for a converted copy.
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
        raise HubDataError(f"dataset {repository} does not exist on the hub, or is private") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise HubDataError(
            f"the hub can't be reached for {repository}: {error}", code="hub_unavailable"
        ) from error
    except (FileNotFoundError, DatasetBuildError, ValueError, RuntimeError) as error:
        # Among these are unknown configurations and splits; the error lists the existing ones.
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
            raise HubDataError(f"{repository} refers to a file outside its repository: {text}")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _refuse_untrusted_files(repository: str, builder: datasets.DatasetBuilder) -> None:
    if type(builder).__module__ not in _READERS:
        raise HubDataError(f"the files of {repository} are not JSON, CSV or Parquet")
    prefix = f"hf://datasets/{repository}@"
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if not file.startswith(prefix) or ".." in file:
                raise HubDataError(f"{repository} refers to a file outside its repository: {file}")
