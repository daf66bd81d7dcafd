"""Every setting an operator can give, read from the environment once: prefix HEFT_."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from store.logs import LogFormat

Hold = Literal["auto", "merged", "shared"]


class StoreSettings(BaseSettings):
    """Where things are and how patient the service is. `heft up` fills the three addresses for a single
    machine.
    """

    model_config = SettingsConfigDict(env_prefix="HEFT_", extra="ignore", frozen=True)

    database_url: str  #: postgresql+psycopg://…
    redis_url: str  #: redis://…, rediss://… or redis+socket://<path>?virtual_host=0
    artifacts_url: str  #: file:///…, s3://bucket/prefix: bytes by key
    model_dir: Path | None = None  #: the operator's folder of base models; a name in it is a model id
    cache_dir: Path | None = None  #: converted aliases and hub downloads

    host: str = "127.0.0.1"
    port: int = 8000

    lease_seconds: float = Field(
        default=60, gt=0
    )  #: a worker that has not written for so long has lost its job
    lease_grace_seconds: float = Field(default=5, ge=0)
    heartbeat_seconds: float = Field(default=10, gt=0)
    control_seconds: float = Field(default=2, gt=0)  #: how often a supervisor reads cancel and pause
    sweep_seconds: float = Field(
        default=15, gt=0
    )  #: how often the reconciler looks for lost hints and leases
    stall_seconds: float = Field(default=900, gt=0)  #: a trainer without progress for so long is ended
    cancel_grace_seconds: float = Field(default=5, ge=0)  #: from SIGTERM to SIGKILL when a job is cancelled
    checkpoint_grace_seconds: float = Field(default=30, ge=0)  #: the same for a pause, with a checkpoint
    checkpoint_seconds: float = Field(default=300, ge=0)  #: the most training a crash may cost; 0: every step
    max_trainer_deaths: int = 3  #: in a row without a new checkpoint: then the job fails
    max_lost_leases: int = 20
    death_pause_seconds: float = Field(
        default=10, ge=0
    )  #: before a job whose trainer died is tried again; four times as long after each further death

    max_file_bytes: int = 2 * 1024**3
    max_line_bytes: int = 8 * 1024**2
    max_rows: int = 5_000_000
    predict_timeout_seconds: float = 30
    predict_max_waiting: int = Field(
        default=4_096, gt=0
    )  #: inputs that wait in one API process for their answers; more are refused with 429
    predict_max_queued: int = Field(
        default=2_000, gt=0
    )  #: requests that wait in the broker for a worker; more are refused with 503
    generate_timeout_seconds: float = Field(default=120, gt=0)  #: for the whole of a completion
    generate_max_waiting: int = Field(
        default=256, gt=0
    )  #: texts that one API process waits for at a time; more are refused with 429
    generate_memory_bytes: int = Field(
        default=1024**3, gt=0
    )  #: what a model's keys and values may hold on a worker while it writes; what has no room waits
    log_format: LogFormat = "text"  #: json: one object a line
    cache_memory_bytes: int | None = Field(
        default=None, ge=0
    )  #: of a training stage; None: a quarter of what is free
    cache_disk_bytes: int = Field(default=0, ge=0)  #: the same, in files beside the job's; 0: none
    train_memory_bytes: int | None = Field(
        default=None, ge=0
    )  #: that a stage may take beyond what its process holds; None: what is free
    trainers: int = Field(default=1, ge=1)  #: jobs that train at a time on this machine, and share its memory
    reuse_days: float = Field(
        default=30, ge=0
    )  #: what a stage ended with is kept so long after its last use, for equal stages of later jobs; 0: not at all
    reuse_bytes: int = Field(default=20 * 1024**3, ge=0)  #: of all that is kept so
    prefill_bytes: int = Field(
        default=4 * 1024**3, ge=0
    )  #: of a training machine's disk: frozen activations, for the next stages on the same rows; 0: none
    memory_budget_bytes: int = 0  #: what one worker may hold in models; 0: three quarters of the machine
    prefix_cache_bytes: int = Field(
        default=512 * 1024**2, ge=0
    )  #: of that, what beginnings of prompts may hold that are kept for whoever repeats them; 0: scores have equal bits
    hold_models: Hold = (
        "auto"  #: how a worker holds fine-tuned models: merged, shared, or as they are asked for
    )

    @property
    def reuse_enabled(self) -> bool:
        """Whether what a stage ended with is kept for equal stages of later jobs."""
        return self.reuse_days > 0 and self.reuse_bytes > 0


@lru_cache(maxsize=1)
def settings() -> StoreSettings:
    """This process's settings. Raises pydantic's ValidationError naming the missing variable."""
    return StoreSettings()
