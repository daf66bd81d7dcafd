"""The dtype in which a base model is loaded."""

from __future__ import annotations

import torch

from heft_engine.config.train import Dtype
from heft_engine.model.base_models import BaseModel
from heft_engine.model.families import FAMILIES
from heft_engine.model.model_files import read_config
from heft_engine.runtime.devices import choose_dtype


def dtype_for(base: BaseModel, requested: Dtype, device: str) -> torch.dtype:
    """Returns the dtype of a base on a device: the requested one, or "auto" as `choose_dtype` resolves it.

    Raises ModelError.
    """
    family = FAMILIES[read_config(base.path).model_type]
    return choose_dtype(requested, device, fits_float16=family.fits_float16)
