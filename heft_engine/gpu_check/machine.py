"""The part `machine`: versions, the rate of matrix products, and of copies between host and device."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path

import peft
import torch
import transformers

from heft_engine.gpu_check.part import Findings, Target


def check_machine(target: Target, findings: Findings) -> None:
    figures = findings.figures
    figures["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    if target.device.type == "cuda":
        properties = torch.cuda.get_device_properties(target.device)
        figures["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
        }
    figures["matmul_tflops"] = round(matmul_rate(target) / 1e12, 2)
    figures["host_to_device_gb_s"] = {
        name: round(_copy_rate(target, pinned) / 1e9, 1)
        for name, pinned in (("pageable", False), ("pinned", True))
        if not pinned or target.device.type == "cuda"
    }


def matmul_rate(target: Target, dtype: torch.dtype = torch.bfloat16) -> float:
    """Returns the floating-point operations a second of square products in bfloat16: 2 n³ for n × n."""
    size = target.size(8_192, 256)
    a, b = (torch.randn(size, size, device=target.device).to(dtype) for _ in range(2))
    return 2 * size**3 / target.seconds(lambda: a @ b, repeats=10)


def _copy_rate(target: Target, pinned: bool) -> float:
    host = torch.empty(target.size(1 << 30, 1 << 20), dtype=torch.uint8, pin_memory=pinned)
    device = torch.empty_like(host, device=target.device)
    return host.numel() / target.seconds(lambda: device.copy_(host, non_blocking=True))


def _driver_version() -> str | None:
    """Returns the NVIDIA driver's version, as the kernel module tells it."""
    with suppress(OSError):
        match = re.search(r"(\d+\.\d+(?:\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else None
    return None
