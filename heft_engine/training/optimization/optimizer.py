"""The optimizer of a stage: AdamW on float32 parameters, with clipped gradients, and a scaled loss for a float16 model.

A step that runs out of memory is taken again; until it has succeeded, parameters and state are those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heft_engine.config.train import Stage
from heft_engine.runtime.out_of_memory import run_twice
from heft_engine.training.optimization.backup import Backup
from heft_engine.training.optimization.loss_scale import LossScale

BETAS, EPSILON = (0.9, 0.999), 1e-8
#: Of torch's AdamW, of each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StageOptimizer:
    """AdamW's parameters and state, and the loss scale of a model in `dtype`.

    Its state has its memory from the start, so a step on a GPU, one kernel for all parameters, takes no more. On a CPU
    a step does; there it has a backup of parameters and state.
    """

    def __init__(
        self,
        stage: Stage,
        parameters: Mapping[str, nn.Parameter],
        no_decay: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        """Raises OutOfMemory."""
        decaying = [parameter for name, parameter in parameters.items() if name not in no_decay]
        constant = [parameter for name, parameter in parameters.items() if name in no_decay]
        groups = [
            {"params": decaying, "weight_decay": stage.weight_decay},
            {"params": constant, "weight_decay": 0.0},
        ]
        self._parameters = dict(parameters)
        self._max_grad_norm = stage.max_grad_norm
        self._device = next(iter(parameters.values())).device
        #: One kernel for all parameters of a GPU; Adam's step counters are on the GPU then.
        self._fused = all(parameter.is_cuda for parameter in parameters.values())
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=self._fused)
        self.loss_scale = LossScale(self._device, dtype)
        self._twice(self._allocate)
        self._backup = None if self._fused else self._twice(lambda: Backup(self._tensors()))

    @property
    def is_restored(self) -> bool:
        """True if a step that runs out of memory leaves parameters and state as they were."""
        return self._backup is not None

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> bool:
        """Clips the gradients and takes a step with them.

        Returns False, and takes none, if gradients of a scaled loss are not finite: the scale is lower now. Raises
        OutOfMemory if memory runs out twice: parameters and state are as before then, where `is_restored`.
        """
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self._twice(lambda: self.loss_scale.unscale(self.adamw))
        self._twice(self._clip)
        if self._backup is not None:
            self._backup.save()
        self._twice(self._step)
        return self.loss_scale.update()

    def _clip(self) -> None:
        parameters = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)

    def _step(self) -> None:
        try:
            self.loss_scale.step(self.adamw)
        except (MemoryError, RuntimeError):
            if self._backup is not None:
                self._backup.restore()
            raise

    def _twice(self, work: Callable[[], Any]) -> Any:
        return run_twice(
            work, self._device, "for the optimizer's step: lower rank, or give the worker more memory"
        )

    def _allocate(self) -> None:
        """Creates AdamW's state as its first step would."""
        for parameter in self._parameters.values():
            step_device = parameter.device if self._fused else torch.device("cpu")
            moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=step_device)
            self.adamw.state[parameter] = {"step": step, **moments}

    def _tensors(self) -> list[Tensor]:
        states = [tensor for state in self.adamw.state.values() for tensor in state.values()]
        return [*self._parameters.values(), *states]

    def tensors(self) -> dict[str, Tensor]:
        """Returns Adam's state and the loss scale, by the names in a checkpoint."""
        state = {
            f"adam/{key}/{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }
        return state | self.loss_scale.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from `tensors`. Parameters that they don't name have not been trained yet."""
        for name, parameter in self._parameters.items():
            for key, value in self.adamw.state[parameter].items():
                saved = tensors.get(f"adam/{key}/{name}")
                if saved is not None:
                    value.copy_(saved)
        self.loss_scale.restore(tensors)
