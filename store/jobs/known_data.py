"""What a dataset's name alone shows to be wrong with a job: refused before anything is queued.

Not part of TrainingSpec, so that jobs of before a dataset was known can still be read. It does NOT fill in what the
name says: the worker does, with the same functions.
"""

from __future__ import annotations

from heft_engine.config import known_datasets
from store.errors import InvalidRequest
from store.jobs.spec import TrainingSpec

FILE_FIELDS = ("training_file", "validation_file", "test_file")


def refuse_misfits(spec: TrainingSpec) -> None:
    """Raises InvalidRequest naming the file or the part of the task at fault."""
    try:
        for field in FILE_FIELDS:
            source, _, rest = (getattr(spec, field) or "").partition(":")
            if source == "hub":
                known_datasets.parse_reference(rest, field)
        known_datasets.with_dataset_defaults(spec.task, spec.training_file)
    except known_datasets.DatasetError as fault:
        raise InvalidRequest(str(fault), param=fault.param) from fault
