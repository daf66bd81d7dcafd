"""Everything the engine refuses, drawn once.

EngineError                 code, message, param: what went wrong, in words that say what to change
├── RowError                a training row that can't be read (line, field, reason)
├── ConfigError             a setting that this model or this data does not allow
├── ModelError              a base model that can't be found, read or trusted
├── TrainingError           diverged, does not train, collapsed rotation, parity broken
├── BundleError             a bundle that is damaged, or whose probe rows don't give their scores
└── Stopped                 not a fault: the run was asked to stop and has written its checkpoint
"""

from __future__ import annotations


class EngineError(Exception):
    """A fault that a user can act on. `code` is stable, `param` names the field at fault (or None)."""

    code = "engine_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class RowError(EngineError):
    """A row that can't be used. `line` counts from 1; 0 when the row came from no file."""

    code = "invalid_training_file"

    def __init__(self, message: str, *, param: str | None = None, line: int = 0) -> None:
        super().__init__(message, param=param)
        self.line = line


class ConfigError(EngineError):
    code = "invalid_config"


class ModelError(EngineError):
    code = "model_not_found"


class TrainingError(EngineError):
    code = "training_failed"


class BundleError(EngineError):
    code = "invalid_bundle"


class Stopped(EngineError):
    code = "stopped"
