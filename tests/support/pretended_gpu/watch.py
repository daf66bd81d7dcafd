"""Counts what a GPU would be asked to do: kernel launches, synchronisations, operations over two devices."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pretended_gpu.torch_parts import number

#: Operations that launch nothing: views, metadata, and memory that nobody writes to.
_WITHOUT_A_LAUNCH = frozenset(
    [
        "device",
        "layout",
        "dim",
        "size",
        "numel",
        "view",
        "_unsafe_view",
        "transpose",
        "t",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "detach",
        "alias",
        "as_strided",
        "_reshape_alias",
        "unbind",
        "chunk",
        "lift_fresh",
        "reshape",
        "numpy_T",
        "diagonal",
        "narrow",
        "empty",
        "empty_strided",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "_local_scalar_dense",
        "sym_size",
        "is_same_size",
        "view_as",
        "unfold",
        "expand_as",
        "resize_",
        "set_",
        "equal",
        "scalar_tensor",
        "_efficientzerotensor",
        "is_pinned",
    ]
)
#: Operations that take an index, which must be on the device of what is indexed.
_INDEXING = frozenset(
    [
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "index_select",
        "gather",
        "embedding",
        "index_copy",
        "index_add",
    ]
)
#: Operations whose result's shape depends on numbers: the host waits for the GPU.
_DATA_DEPENDENT = frozenset({"nonzero", "repeat_interleave", "masked_select", "unique"})


class Watch(TorchDispatchMode):
    """Counters by operation and place in the engine. `item()` is answered with a number that does no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()

    def clear(self) -> None:
        """Begins a new count."""
        for counter in (self.launches, self.synchronisations, self.mixed):
            counter.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[-1]
        if name in _INDEXING:
            self._check_index(name, inputs)
        decomposed = self._decompose(func, name, args, kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        if name == "allclose":
            return True
        if name == "_pin_memory":
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        on_gpu = any(tensor.device.type == "cuda" for tensor in inputs)
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            if on_gpu:
                self.synchronisations[f"{name} {_place()}"] += 1
            if isinstance(inputs[0], FakeTensor):
                return True if name == "equal" else number(inputs[0])
        if name in _DATA_DEPENDENT and on_gpu:
            self.synchronisations[f"{name} {_place()}"] += 1
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs, inputs, outputs)
        if name not in _WITHOUT_A_LAUNCH and (on_gpu or any(t.device.type == "cuda" for t in outputs)):
            self.launches[name] += 1
        return out

    def _decompose(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In inference mode composite operations arrive whole: taken apart here, as autograd does it elsewhere."""
        whole = name in ("item", "allclose", "is_nonzero", "scaled_dot_product_attention")
        if (
            whole
            or func.namespace != "aten"
            or not torch.is_inference_mode_enabled()
            or not func._can_decompose()
        ):
            return NotImplemented
        try:
            with self:
                return func.decompose(*args, **kwargs)
        except NotImplementedError:
            return NotImplemented

    def _check_index(self, name: str, inputs: list[Tensor]) -> None:
        indexed = inputs[0].device
        for index in inputs[1:]:
            from_host = index.device.type == "cpu" and (index.dim() == 0 or name.startswith("index"))
            if index.device != indexed and not from_host:
                self.mixed[f"{name} of {indexed} by {index.device} {_place()}"] += 1
            elif index.device.type == "cpu" and indexed.type == "cuda" and index.dim() > 0:
                self.synchronisations[f"{name} by an index on the CPU {_place()}"] += 1

    def _check_copy(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        source = inputs[1] if name == "copy_" else inputs[0]
        between = {source.device.type, outputs[0].device.type}
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if between == {"cpu", "cuda"} and not asynchronous:
            self.synchronisations[f"{source.device.type} to {outputs[0].device.type} {_place()}"] += 1


def _place() -> str:
    """The two innermost lines of the engine on the stack."""
    frame, places = sys._getframe(2), []
    while frame is not None and len(places) < 2:
        if "heft_engine/" in frame.f_code.co_filename:
            places.append(f"{frame.f_code.co_filename.split('heft_engine/')[-1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return "at " + (" < ".join(places) or "(backward)")
