"""HEFT (arXiv 2509.09801) as a library: trains a bundle from a configuration and paths, and loads bundles to predict.

    from heft_engine import TrainConfig, train, load

Names are imported on first use, so that `heft_engine.config` can be imported without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from heft_engine.config.run_file import RunOptions
from heft_engine.config.train import TrainConfig

if TYPE_CHECKING:
    from heft_engine.bundle.format import Bundle
    from heft_engine.serving.predictor import Prediction, Predictor, load, load_base
    from heft_engine.training.run import train

__all__ = ["Bundle", "Prediction", "Predictor", "RunOptions", "TrainConfig", "load", "load_base", "train"]

_HOMES = {
    "Bundle": "bundle.format",
    "Prediction": "serving.predictor",
    "Predictor": "serving.predictor",
    "load": "serving.predictor",
    "load_base": "serving.predictor",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
