"""The scale of the loss while a float16 model is trained: torch's GradScaler, with a floor.

Gradients below 6e-8 are zero in float16. Those of a loss times 65,536 are not; where they overflow, the step is not
taken and the scale is halved (arXiv 1710.03740, section 3.2). It is doubled after 2,000 steps without an overflow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Gradients that overflow with a scale below this one would overflow without any.
FLOOR = 1.0
_SCALE, _GROWTH = "loss_scale/scale", "loss_scale/steps_without_overflow"


class LossScale:
    """The loss scale of a model in `dtype`; of one that is not in float16, 1 and without any effect."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.is_used = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.is_used)
        self.value = self._scaler.get_scale()

    @property
    def is_exhausted(self) -> bool:
        """True if gradients have overflowed with the lowest scale."""
        return self.value < FLOOR

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss to compute gradients of."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes gradients of the scaled loss those of the loss, and notes whether they are finite."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the optimizer's step if its gradients are finite."""
        self._scaler.step(optimizer)

    def update(self) -> bool:
        """Adjusts the scale after a step. Returns False if the step was not taken.

        Waits for a GPU, to read the scale.
        """
        if not self.is_used:
            return True
        before = self.value
        self._scaler.update()
        self.value = self._scaler.get_scale()
        return self.value >= before

    def report(self, overflows: int) -> dict[str, float]:
        """Returns what a step's metrics say of the scale: nothing, where it is not used. overflows: of the stage."""
        return {"loss_scale": self.value, "overflows": overflows} if self.is_used else {}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the scale as a checkpoint holds it: nothing, where it is not used."""
        if not self.is_used:
            return {}
        state = self._scaler.state_dict()
        return {
            _SCALE: torch.tensor(state["scale"], dtype=torch.float64),
            _GROWTH: torch.tensor(state["_growth_tracker"]),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from `tensors`."""
        if self.is_used and _SCALE in tensors:
            state = {"scale": float(tensors[_SCALE]), "_growth_tracker": int(tensors[_GROWTH])}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **state})
            self.value = self._scaler.get_scale()
