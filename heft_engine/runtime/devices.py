"""Where a run computes and in which precision."""

from __future__ import annotations

import torch

from heft_engine.config.train import Dtype


def choose_device(wanted: str | None = None) -> str:
    """`wanted`, else "cuda" with one GPU, "auto" (spread by accelerate) with several, else "cpu"."""
    if wanted is not None:
        return wanted
    if not torch.cuda.is_available():
        return "cpu"
    return "auto" if torch.cuda.device_count() > 1 else "cuda"


def choose_dtype(wanted: Dtype, device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (float32 otherwise), or as asked."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    fast = torch.cuda.is_bf16_supported() if device != "cpu" else _cpu_has_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that `dtype_name` wrote."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
