"""The operator's settings, read from environment variables with the prefix HEFT_."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from store.logs import LogFormat

Hold = Literal["auto", "merged", "shared"]
IntegrationType = Literal["wandb", "mlflow", "trackio", "tensorboard"]
INTEGRATIONS: tuple[str, ...] = get_args(IntegrationType)


_HOST_PATTERN = re.compile(r"(\*\.)?[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]")


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


class StoreSettings(BaseSettings):
    """Settings of API and workers. `heft up` sets the three URLs on a single machine."""

    model_config = SettingsConfigDict(env_prefix="HEFT_", extra="ignore", frozen=True)

    database_url: str  #: postgresql+psycopg://…
    redis_url: str  #: redis://…, rediss://… or redis+socket://<path>?virtual_host=0
    artifacts_url: str  #: file:///… or s3://bucket/prefix
    model_dir: Path | None = None  #: a folder of base models; a folder's name is a model id
    cache_dir: Path | None = None  #: for converted models and hub downloads

    host: str = "127.0.0.1"
    port: int = 8000
    #: Names in the Host header beside loopback's and `host`, separated by commas; *.example.org and * are possible.
    allowed_hosts: str = ""
    log_format: LogFormat = "text"  #: json: one object a line

    lease_seconds: float = Field(default=60, gt=0)  #: a worker without a heartbeat for so long loses its job
    lease_grace_seconds: float = Field(default=5, ge=0)
    heartbeat_seconds: float = Field(default=10, gt=0)
    control_seconds: float = Field(default=2, gt=0)  #: between two looks for a cancel or pause request
    sweep_seconds: float = Field(default=15, gt=0)  #: between two sweeps for lost hints and leases
    stall_seconds: float = Field(default=900, gt=0)  #: a trainer without progress for so long is stopped
    cancel_grace_seconds: float = Field(default=5, ge=0)  #: from SIGTERM to SIGKILL at a cancel
    checkpoint_grace_seconds: float = Field(default=30, ge=0)  #: the same at a pause, for a checkpoint
    checkpoint_seconds: float = Field(default=300, ge=0)  #: the most training that a crash loses
    max_trainer_deaths: int = 3  #: so many crashes in a row without a new checkpoint fail the job
    max_lost_leases: int = 20
    #: Before a job whose trainer crashed is tried again; four times as long after each further crash.
    death_pause_seconds: float = Field(default=10, ge=0)

    max_connections: int = Field(default=2_048, gt=0)  #: of one API process
    max_connections_per_client: int = Field(default=512, gt=0)
    header_seconds: float = Field(default=15, gt=0)  #: for the headers of a request to arrive
    max_header_bytes: int = Field(default=32 * 1024, gt=0)
    #: Wrong API keys from one address; more are refused with 429.
    wrong_keys_per_minute: int = Field(default=30, gt=0)

    #: Trackers that jobs may send their metrics to, separated by commas: wandb, mlflow, trackio, tensorboard.
    integrations: str = ""
    #: Of trackers that write files; None: a folder in the worker's cache.
    tracking_dir: Path | None = None

    max_question_bytes: int = Field(default=4 * 1024**2, gt=0)  #: of a request for answers or text
    max_job_bytes: int = Field(default=1024**2, gt=0)  #: of a request for a job or a study
    #: Of all requests' JSON in one API process; more are refused with 503.
    max_body_memory_bytes: int = Field(default=256 * 1024**2, gt=0)
    #: A request's body that takes longer must arrive at `body_bytes_per_second` on average.
    body_grace_seconds: float = Field(default=30, gt=0)
    body_bytes_per_second: float = Field(default=16 * 1024, gt=0)
    max_file_bytes: int = 2 * 1024**3
    max_line_bytes: int = 8 * 1024**2
    max_rows: int = 5_000_000

    predict_timeout_seconds: float = 30
    #: Inputs that wait for their answers in one API process; more are refused with 429.
    predict_max_waiting: int = Field(default=4_096, gt=0)
    #: Requests that wait for a worker in the broker; more are refused with 503.
    predict_max_queued: int = Field(default=2_000, gt=0)
    generate_timeout_seconds: float = Field(default=120, gt=0)  #: of a whole completion
    #: Texts that one API process waits for at a time; more are refused with 429.
    generate_max_waiting: int = Field(default=256, gt=0)
    #: Of a worker's memory, for KV caches while it generates text; requests beyond it wait.
    generate_memory_bytes: int = Field(default=1024**3, gt=0)

    #: Of memory, for a training stage's cached activations; None: a quarter of what is free.
    cache_memory_bytes: int | None = Field(default=None, ge=0)
    #: Of disk, for the same; 0: none.
    cache_disk_bytes: int = Field(default=0, ge=0)
    #: Of memory, for a training stage beyond what its process holds already; None: what is free.
    train_memory_bytes: int | None = Field(default=None, ge=0)
    #: Processes of a training worker that train one job together, each on a GPU of its own if there is one.
    train_processes: int = Field(default=1, ge=1)
    #: Training workers that take one job together, each on a machine of its own, with as many processes each.
    train_nodes: int = Field(default=1, ge=1)
    #: This machine's name or address, by which the others' processes reach it; empty: its host name.
    train_address: str = ""
    trainers: int = Field(default=1, ge=1)  #: jobs that train at a time on this machine, and share its memory
    #: A stage's result is stored so long after its last use, for equal stages of later jobs; 0: not at all.
    reuse_days: float = Field(default=30, ge=0)
    reuse_bytes: int = Field(default=20 * 1024**3, ge=0)  #: of all stored stage results
    #: Of a training machine's disk, for frozen activations that later stages on the same rows reuse; 0: none.
    prefill_bytes: int = Field(default=4 * 1024**3, ge=0)

    #: Of models in one inference worker; 0: three quarters of the machine's memory.
    memory_budget_bytes: int = 0
    #: Of that budget, for the prefix cache; 0: none.
    prefix_cache_bytes: int = Field(default=512 * 1024**2, ge=0)
    hold_models: Hold = "auto"  #: fine-tuned models in memory: merged, shared, or chosen by use

    @model_validator(mode="after")
    def _bodies_fit_the_memory(self) -> StoreSettings:
        largest = max(self.max_question_bytes, self.max_job_bytes)
        if self.max_body_memory_bytes < 2 * largest:
            raise ValueError(
                "HEFT_MAX_BODY_MEMORY_BYTES must be at least twice HEFT_MAX_QUESTION_BYTES and HEFT_MAX_JOB_BYTES: one "
                "owner may take half of it"
            )
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: str) -> str:
        for name in _names(value):
            if name != "*" and not _HOST_PATTERN.fullmatch(name):
                raise ValueError(f"{name!r} is no host name: write heft.example.org, *.example.org, or *")
        return value

    @field_validator("integrations")
    @classmethod
    def _integrations_are_known(cls, value: str) -> str:
        for name in _names(value):
            if name not in INTEGRATIONS:
                raise ValueError(f"{name!r} is no tracker: the known ones are {', '.join(INTEGRATIONS)}")
        return value

    @property
    def enabled_integrations(self) -> list[str]:
        """The names of `integrations`."""
        return _names(self.integrations)

    @property
    def allowed_host_names(self) -> list[str]:
        """The names of `allowed_hosts`."""
        return _names(self.allowed_hosts)

    @property
    def reuse_enabled(self) -> bool:
        """True when stage results are stored for equal stages of later jobs."""
        return self.reuse_days > 0 and self.reuse_bytes > 0


@lru_cache(maxsize=1)
def settings() -> StoreSettings:
    """Returns this process's settings. Raises pydantic's ValidationError naming a missing variable."""
    return StoreSettings()
