"""The JSON files that `python -m heft_engine train` and `check` are started with.

The worker builds them, the commands read them. Paths are those of the machine that trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from heft_engine.config.train import MAX_LINE_BYTES, Settings, TrainConfig

#: The environment variable that names the listening socket, an inherited descriptor, where the ranks of a run meet.
LISTEN_FD = "HEFT_LISTEN_FD"
#: The environment variable with the secret that the ranks of a run share.
SECRET = "HEFT_RENDEZVOUS_SECRET"

FileField = Literal["training_file", "validation_file", "test_file"]


class RunOptions(Settings):
    """A run's use of its machine. None of it is part of the result, apart from rounding."""

    model_dir: Path | None = None  #: a folder of base models, by name
    cache_dir: Path | None = None  #: converted and downloaded models, compiled layers
    allow_paths: bool = True  #: `config.model` may be any directory
    device: str | None = None  #: None: the GPU when there is one
    checkpoint_dir: Path | None = None  #: None: no checkpoints
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 300.0  #: between two checkpoints inside an epoch
    #: Models at the ends of epochs that are written as checkpoints too: the last so many of the run, and earlier ones
    #: that are far apart in time.
    n_checkpoints: Annotated[int, Field(ge=0)] = 0
    #: The bundle of `config.model`, a fine-tuned model that the run goes on from; None: `config.model` is a base, or
    #: with `allow_paths` the path of a bundle.
    start: Path | None = None
    resume: Path | None = None  #: a checkpoint of an earlier run of the same config and rows
    #: Bytes that a stage's activation cache may take in memory; None: a quarter of what is free at its start.
    cache_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    cache_disk_bytes: Annotated[int, Field(ge=0)] = 0  #: the same in files beside the bundle
    #: Bytes that a stage may take beyond what the process already has; None: what is free.
    memory_bytes: Annotated[int, Field(ge=0)] | None = None
    sharers: Annotated[int, Field(ge=1)] = 1  #: runs that share the free memory, this one included
    #: Processes on this machine that train this run together, each on a GPU of its own if there is one.
    processes: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = (
        1  #: machines that train this run together, with as many processes each
    )
    node_rank: Annotated[int, Field(ge=0)] = 0  #: of this machine; 0 has the rank that evaluates and writes
    rendezvous: str | None = None  #: host:port of machine 0, where the processes of several machines meet
    #: A text task is also generated and measured on the validation rows at the end, for a search to choose by.
    evaluate_validation: bool = False


class RunFile(RunOptions):
    """One run of the engine: what is trained on which rows, where the bundle goes, and on which machine."""

    config: TrainConfig
    train: Path
    eval: Path | None = None
    test: Path | None = None
    out: Path
    allow_paths: bool = False  # the config may come from a request
    max_line_bytes: int = MAX_LINE_BYTES
    #: A folder of results of earlier runs' stages; None: no stage is reused, and none is stored.
    stage_dir: Path | None = None
    #: The starter puts results there on request and stores new ones: heft_engine.commands.stage_exchange.
    stages_on_request: bool = False
    #: A folder of frozen activations that runs on this machine share; None: none are reused.
    activation_dir: Path | None = None
    activation_bytes: Annotated[int, Field(ge=0)] | None = None  #: its budget; None: the default, 0: none
    owner: str = ""  #: activations are shared between runs of the same owner only


class MachineSettings(Settings):
    """A machine that trains, for a plan: `gpus` of gpu_bytes that one run uses, and its memory for one run.

    stage_bytes: what a stage may take beside the model; None: all that is free. cache_memory_bytes: what its cache may
    take of the machine's memory; None: a quarter. auto_dtype: the dtype that it chooses for a model.
    """

    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_bytes: Annotated[int, Field(ge=0)] = 0
    host_bytes: Annotated[int, Field(gt=0)]
    stage_bytes: Annotated[int, Field(ge=0)] | None = None
    cache_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    auto_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class CheckFile(Settings):
    """A model, settings and files to check before training. `files`: a path, `hub:…` or `sample:…` for each field."""

    config: TrainConfig
    start: Path | None = None  #: the bundle of `config.model`, as in RunOptions
    files: dict[FileField, str]
    out: Path
    machine: MachineSettings | None = None  #: the run is planned for it, too
    max_rows: int
    max_line_bytes: int
    model_dir: Path | None = None
    cache_dir: Path | None = None
