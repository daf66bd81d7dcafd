"""`devices`: the GPUs that torch can use on this machine, as JSON. `heft doctor` runs it."""

from __future__ import annotations

import argparse
import json

import torch

from heft_engine.runtime.devices import unusable_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """Prints {"gpus": [{name, memory_bytes, compute_capability}], "cuda", "unusable"}.

    unusable: why a GPU that is there can't be used, or null.
    """
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": capability,
            }
        )
    print(json.dumps({"gpus": gpus, "cuda": torch.version.cuda, "unusable": unusable_gpu()}))
