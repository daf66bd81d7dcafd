"""torch's random state, on the CPU and on every GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: The names of the states in a checkpoint; a GPU's has its number behind it.
_CPU, _CUDA = "rng", "rng/cuda/"


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The states of torch's default generators."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def current(cls) -> RandomState:
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if initialized else []
        return cls(cpu=torch.get_rng_state(), cuda=cuda)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RandomState:
        """Returns the state of `to_tensors`; checkpoints of earlier versions have the CPU's alone."""
        gpus = sorted(
            (name for name in tensors if name.startswith(_CUDA)), key=lambda name: int(name[len(_CUDA) :])
        )
        return cls(cpu=tensors[_CPU], cuda=[tensors[name] for name in gpus])

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns the states as tensors with names, as checkpoints carry them."""
        return {_CPU: self.cpu} | {f"{_CUDA}{index}": state for index, state in enumerate(self.cuda)}

    def restore(self) -> None:
        """Makes the next random numbers those that came after `current`, on the CPU and on the GPUs that there are."""
        torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
