"""JSON files that commands read, validated by pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from heft_engine.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


def read_json_file(path: Path, model: type[M]) -> M:
    """Raises ConfigError that names the first field at fault, or "run_file"."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the run file can't be read: {error}", param="run_file") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "run_file"
        raise ConfigError(f"the run file's {field}: {first['msg']}", param=field) from error
