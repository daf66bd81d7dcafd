"""Schedules of a stage that need no state: its seeds, the order of its rows, its learning rate."""

from __future__ import annotations

import hashlib
import math

import torch

from heft_engine.config.train import StageSettings


def derived_seed(*parts: int) -> int:
    """Returns a seed of its own for each stage, epoch and purpose, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def epoch_order(seed: int, stage_index: int, epoch: int, rows: int) -> list[int]:
    """Returns the order of rows in an epoch, from seed, stage and epoch alone."""
    generator = torch.Generator().manual_seed(derived_seed(seed, stage_index, epoch))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


def learning_rate_at(stage: StageSettings, step: int, total: int) -> float:
    """Returns the learning rate of a step (0-based) of `total`: linear warm-up, then linear, cosine or constant."""
    peak = float(stage.learning_rate)
    warmup = min(total - 1, round(stage.warmup_ratio * total))
    if step < warmup:
        return peak * ((step + 1) / (warmup + 1))
    left = (total - step) / (total - warmup)
    if stage.scheduler == "cosine":
        return peak * (0.5 * (1 - math.cos(math.pi * left)))
    return peak * left if stage.scheduler == "linear" else peak
