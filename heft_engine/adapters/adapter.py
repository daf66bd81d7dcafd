"""The interface of everything that a stage can train. LoRA (heft_engine.adapters.lora) and ReFT
(heft_engine.adapters.reft) implement it; heft_engine.adapters.registry lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, nn

from heft_engine.config.train import parse_positions
from heft_engine.data.encoding import Example, intervened_positions
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Between what is frozen and what a stage trains: `layer` is the first decoder layer that must run in each step.

    LoReFT at layer L: layer L + 1, with the stage's interventions at L. LoRA from layer l on: layer l.
    """

    layer: int
    interventions: tuple[PlacedIntervention, ...] = ()  #: act on the input of `layer`
    #: Of every trained intervention; empty where every token is trained on.
    positions: tuple[str, ...] = ()
    #: True when nothing trained acts above `layer`, so that hidden states there are those of other stages too.
    clear_above: bool = False

    def first_token(self, prompt_length: int) -> int:
        """Returns the first token of a prompt that training can change or that is read. All before it is constant."""
        if not self.positions:
            return 0
        intervened = [
            position
            for positions in self.positions
            for position in intervened_positions(prompt_length, *parse_positions(positions))
        ]
        return min([prompt_length - 1, *intervened])


W_co = TypeVar("W_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Merge(Generic[W_co]):
    """A finished stage that is part of the base's weights now.

    weights: what a bundle stores of it, in the adapter's own form. record: the parity check of the merge, as JSON.
    """

    weights: W_co
    record: dict[str, Any]


class Adapter(ABC):
    """A stage's trainable parameters, attached to a model until `finish`.

    Parameters are named: checkpoints store them, and what belongs to them, under these names.
    """

    #: True when `finish` merges the adapter into the base's weights; otherwise it stays in place.
    merges: ClassVar[bool]

    @classmethod  # noqa: B027  not every adapter has settings that depend on the model
    def check_stage(cls, lm: PackedLM, stage: Any) -> None:
        """Raises ConfigError for resolved settings that do not fit the model. Called before any stage is trained."""

    @classmethod
    @abstractmethod
    def attach(cls, lm: PackedLM, stage: Any) -> Self:
        """Puts fresh parameters into the model, in place. `stage`: resolved settings, nothing left on "auto".

        Raises ConfigError for settings that do not fit the model.
        """

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the raw parameters (float32) that the optimizer steps."""

    @abstractmethod
    def boundary(self) -> Boundary:
        """Returns where the frozen part of the model ends, for caching."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Switches the adapter's dropout on or off. The base stays in eval()."""

    @abstractmethod
    def finish(self, probes: Sequence[Example]) -> Merge[Any] | None:
        """Ends the stage: merges the adapter, checked on probe rows, or freezes it in place and returns None.

        Raises TrainingError (parity_broken) when the merged model is not the trained one.
        """

    def weights(self) -> Any | None:
        """Returns what a bundle stores of a merging adapter as it is now; None for one that stays in place."""
        return None

    def merge_bytes(self) -> int:
        """Returns the bytes that a merge adds to the model's weights: those of weights that were in 4 bits before."""
        return 0

    def no_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must not touch."""
        return set()

    def buffers(self) -> dict[str, Tensor]:
        """Returns tensors beside the parameters that a checkpoint must restore, bit for bit."""
        return {}

    def check(self) -> None:  # noqa: B027  not every adapter has an invariant
        """Raises TrainingError when an invariant of the parameters is broken, such as R's orthonormal rows."""
