"""Devices: which one to compute on, in which precision, and how much memory is used and free there.

Memory limits of containers (control groups, version 2) are respected.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from heft_engine.config.train import Dtype
from heft_engine.errors import ConfigError

_MOST_RESERVED = 2 << 30
_CGROUP = Path("/sys/fs/cgroup")
#: There with NVIDIA's driver.
_DRIVER = Path("/dev/nvidiactl")
#: Words in the command line of every training process.
_TRAINING_COMMAND = frozenset({"heft_engine", "train"})


def choose_device(requested: str | None = None) -> str:
    """Returns `requested`, or what HEFT_DEVICE says; else "cuda" where there is a GPU, else "cpu".

    Of several GPUs one is used, the current one: a model is spread over all of them on request ("auto") only.
    Raises ConfigError (gpu_unusable) for a GPU that torch can't use: the CPU would take days for its work.
    """
    chosen = requested or os.environ.get("HEFT_DEVICE")
    if chosen:
        return chosen
    if torch.cuda.is_available():
        return "cuda"
    reason = unusable_gpu()
    if reason is not None:
        message = (
            f"this machine has an NVIDIA GPU that can't be used: {reason}; HEFT_DEVICE=cpu does without it"
        )
        raise ConfigError(message, param="device", code="gpu_unusable")
    return "cpu"


def unusable_gpu() -> str | None:
    """Returns why torch can't use this machine's GPU, and what to do; None if it can, or if there is none to use."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if is_hidden or not _DRIVER.exists() or torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA, install torch's build for CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"{first_line} (torch {torch.__version__} is built for CUDA {torch.version.cuda})"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no device"


def machine() -> dict[str, Any]:
    """Returns what plans need to know of this machine: {"gpus": [bytes of each], "host_bytes", "auto_dtype"}."""
    gpus: list[int] = []
    device = "cpu"
    if torch.cuda.is_available() and choose_device() != "cpu":
        device = "cuda"
        gpus = [
            torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())
        ]
    host = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        host = min(host, int((_CGROUP / "memory.max").read_text()))
    return {"gpus": gpus, "host_bytes": host, "auto_dtype": dtype_name(choose_dtype("auto", device))}


def choose_dtype(requested: Dtype, device: str, *, fits_float16: bool = True) -> torch.dtype:
    """Returns the requested dtype; for "auto", bfloat16 where the hardware multiplies it.

    Elsewhere it is float32 on a CPU, and float16 on a GPU: before compute capability 8.0 (T4, V100) bfloat16 is
    emulated there.
    fits_float16: False for a model whose hidden states are too large for it, which is float32 there.
    """
    if requested != "auto":
        return dtype_of(requested)
    if device == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if fits_float16 else torch.float32


def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def kernels_enabled() -> bool:
    """Returns False if HEFT_KERNELS=off keeps the engine's own C++ from being compiled and loaded."""
    return os.environ.get("HEFT_KERNELS", "").lower() != "off"


def batch_invariance_requested() -> bool:
    """Returns True if HEFT_BATCH_INVARIANT=1 asks for scores that have the same bits in any batch, on a CPU."""
    return os.environ.get("HEFT_BATCH_INVARIANT", "").lower() in ("1", "true", "on")


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resident_bytes(device: torch.device) -> int:
    """Bytes that this process uses: allocated by torch on a GPU, resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "meta":
        return 0
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control groups, or no limit ("max")
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return free


def reserved_bytes(device: torch.device) -> int:
    """Bytes of a GPU that no plan uses: libraries' workspaces, machine code, and the allocator's own rounding."""
    if device.type != "cuda":
        return 0
    _, total = torch.cuda.mem_get_info(device)
    return reserved_share(total)


def reserved_share(total: int) -> int:
    """Returns `reserved_bytes` of a GPU with so many bytes."""
    return min(_MOST_RESERVED, total // 12)


def memory_share(device: torch.device, runs: int) -> int:
    """Bytes that one of `runs` concurrent training runs, this process among them, may still allocate.

    On a CPU, free memory and what the runs use already are divided evenly, so that a run that starts later, and finds
    less free, is not disadvantaged twice; memory of other processes counts for nobody. On a GPU free memory is divided
    evenly.
    """
    free = free_bytes(device)
    if runs == 1 or device.type == "cuda":
        return free // runs
    even = (free + _training_bytes()) // runs - resident_bytes(device)
    return max(free // runs, min(free, even))


def _training_bytes() -> int:
    """Resident bytes of all training processes on this machine, this one included."""
    total = 0
    for process in psutil.process_iter(["pid", "cmdline", "memory_info"]):
        is_training = set(process.info["cmdline"] or ()) >= _TRAINING_COMMAND
        if (is_training or process.info["pid"] == os.getpid()) and process.info["memory_info"] is not None:
            total += process.info["memory_info"].rss
    return total


def cpp_compiler() -> str | None:
    """Returns the path of a C++ compiler: $CXX, g++, clang++ or c++."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)
