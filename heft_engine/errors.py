"""The exceptions of the engine.

EngineError                 code, message, param; the message says what to change
├── RowError                an invalid training row (line, field, reason)
├── ConfigError             a setting that the model or the data does not allow
├── ModelError              a base model that can't be found, read or trusted
├── TrainingError           diverged, no progress, collapsed rotation, failed merge check
├── Overloaded              no time for the request now; the same one may be answered later
├── OutOfMemory             a single row or prompt that the device has no memory for
├── RankLost                another process of the same run has ended or does not answer
├── ForgedMessage           a message between the ranks that none of them has sent
├── FailedElsewhere         another machine of the same run has failed, with this code
├── BundleError             a damaged bundle, or one whose probe rows don't give their stored scores
└── Stopped                 no fault: the run was asked to stop and has written its checkpoint
"""

from __future__ import annotations


class EngineError(Exception):
    """An error that a user can act on. `code` is stable; `param` is the field at fault, or None."""

    code = "engine_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class RowError(EngineError):
    """An invalid row. `line` counts from 1; 0 for a row that is not from a file."""

    code = "invalid_training_file"

    def __init__(
        self, message: str, *, param: str | None = None, line: int = 0, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.line = line


class ConfigError(EngineError):
    code = "invalid_config"


class ModelError(EngineError):
    code = "model_not_found"


class TrainingError(EngineError):
    code = "training_failed"


class Overloaded(EngineError):
    code = "overloaded"


class OutOfMemory(EngineError):
    code = "out_of_memory"


class RankLost(EngineError):
    code = "rank_lost"


class ForgedMessage(EngineError):
    code = "forged_message"


class FailedElsewhere(EngineError):
    pass


class BundleError(EngineError):
    code = "invalid_bundle"


class Stopped(EngineError):
    code = "stopped"
