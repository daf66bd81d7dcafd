"""Rows from a dataset on the Hugging Face hub: `hub:<org>/<name>[:<config>][:<split>]`.

A dataset's card may name files anywhere, on this machine or on another (`datasets` asked such an address before
it refused), and readers that unpickle. So the card is judged first, then the files that are to be read: JSON, CSV
or Parquet of that very repository.
It does NOT know the hub's address and token: the hub's own libraries take them from HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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

from heft_engine.errors import EngineError, RowError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    r"(:(?P<config>[A-Za-z0-9._+-]+)(?=:))?"
    r"(:(?P<split>[A-Za-z0-9._-]+(\[[0-9:%-]*\])?))?"
)
_READERS = {f"datasets.packaged_modules.{name}.{name}" for name in ("json", "csv", "parquet")}

Fields = Mapping[str, Any]


class HubDataError(EngineError):
    """A dataset that can't be found, read or understood."""

    code = "dataset_not_found"


def load_hub_rows(reference: str, split: str, *, cache_dir: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as `heft_engine.rows` reads them; `split` is for a reference that names none.

    Downloads it into `cache_dir` (None: the user's own cache). Raises HubDataError (dataset_not_found,
    dataset_access_denied, hub_unavailable) and RowError when its columns fit none of the formats.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise HubDataError(f"{reference!r} is no dataset: write hub:<org>/<name>[:<config>][:<split>]")
    data = _load(match["repository"], match["config"], match["split"] or split, cache_dir)
    to_row = _reader_of(data.column_names)
    for line, fields in enumerate(data, start=1):
        try:
            yield to_row(fields)
        except (KeyError, IndexError, TypeError, ValueError) as error:
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


def _reader_of(columns: list[str]) -> Callable[[Fields], dict[str, Any]]:
    """How rows with these columns become ours; columns that no format has (ids, sources) are left out."""
    for needed, reader in _READERS_BY_COLUMNS:
        if needed <= set(columns):
            return reader
    raise RowError(
        f"the columns {', '.join(columns)} fit none of the formats: question and answer (with passage or "
        "choices), prompt and completion, or messages"
    )


def _messages(fields: Fields) -> dict[str, Any]:
    return {"messages": fields["messages"]}


def _completion(fields: Fields) -> dict[str, Any]:
    return {"prompt": fields["prompt"], "completion": fields["completion"]}


def _keyed_choices(fields: Fields) -> dict[str, Any]:
    """Choices with labels of their own and the label of the right one, as in ARC and CommonsenseQA."""
    choices = fields["choices"]
    answer = choices["text"][choices["label"].index(fields["answerKey"])]
    return {"question": fields["question"], "choices": choices["text"], "answer": answer}


def _choices(fields: Fields) -> dict[str, Any]:
    """A list of choices; the right one by itself, or as its number, as in MMLU."""
    answer = fields["answer"]
    if isinstance(answer, int):
        answer = fields["choices"][answer]
    return {**_question(fields), "choices": fields["choices"], "answer": answer}


def _question_answer(fields: Fields) -> dict[str, Any]:
    """True, false, yes or no; any other text is an answer to be written, as in GSM8K."""
    answer = fields["answer"]
    if isinstance(answer, str) and answer.strip().lower() not in ("yes", "no"):
        return {"prompt": fields["question"], "completion": answer}
    return {**_question(fields), "answer": answer}


def _question(fields: Fields) -> dict[str, Any]:
    passage = fields.get("passage") or None
    return {"question": fields["question"], **({"passage": passage} if passage else {})}


_READERS_BY_COLUMNS: tuple[tuple[set[str], Callable[[Fields], dict[str, Any]]], ...] = (
    ({"messages"}, _messages),
    ({"prompt", "completion"}, _completion),
    ({"question", "choices", "answerKey"}, _keyed_choices),
    ({"question", "choices", "answer"}, _choices),
    ({"question", "answer"}, _question_answer),
)
