"""A model's float32 passes without a float32 copy: the numbers of a float32 model, one module's weights at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_models import packed, probe_logits, probes, with_intervention
from tiny_models import FAMILIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from heft_engine.adapters.lora import peft_layers
from heft_engine.adapters.lora.merge import merge_and_verify
from heft_engine.adapters.parity import probe_states
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.errors import OutOfMemory
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.float32_lm import Float32LM
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import pack

MakeModel = Callable[[str], Path]


def float32_twin(lm: PackedLM, path: Path) -> PackedLM:
    """Returns the model loaded in float32, with the weights of `lm`."""
    twin = packed(path)
    with torch.no_grad():
        for name, parameter in twin.model.named_parameters():
            parameter.copy_(lm.model.get_parameter(name))
    return twin


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_have_the_numbers_of_a_float32_model(make_tiny_model: MakeModel, family: str) -> None:
    lm = packed(make_tiny_model(family), torch.bfloat16)
    exact, twin = Float32LM(lm), float32_twin(lm, make_tiny_model(family))
    states = probe_states(exact, probes())
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, probe_states(twin, probes()), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(probe_logits(exact, probes()), probe_logits(twin, probes()), atol=1e-5, rtol=0)
    assert (states - probe_states(lm, probes())).abs().max() > 1e-3, "bfloat16 is visible at this size"


def test_weights_are_those_of_the_time_of_the_pass_and_stay_as_they_are(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    exact = Float32LM(lm)
    before = probe_states(exact, probes())
    weight = lm.layers[2].self_attn.q_proj.weight
    original = weight.detach().clone()
    exact.on_load(
        "model.layers.2.self_attn.q_proj",
        lambda: exact.layers[2].self_attn.q_proj.weight.mul_(2),
    )
    assert not torch.equal(probe_states(exact, probes()), before)
    assert torch.equal(weight, original), "a change is of the loaded weights alone"
    with torch.no_grad():
        weight.div_(2)
    torch.testing.assert_close(probe_states(exact, probes()), before, atol=1e-6, rtol=0)
    assert all(parameter.is_meta for parameter in exact.model.parameters()), "nothing stays loaded"


def test_interventions_act_as_in_the_model(tiny_llama_dir: Path) -> None:
    lm = with_intervention(tiny_llama_dir, "f2+l2")
    exact = Float32LM(lm)
    exact.interventions.extend(lm.interventions)
    batch = pack(probes())
    with torch.inference_mode():
        hidden = lm.hidden(batch)
        torch.testing.assert_close(exact.hidden(batch), hidden, atol=1e-6, rtol=0)
        with exact.interventions.disabled():
            assert (exact.hidden(batch) - hidden).abs().max() > 1e-3


def test_products_are_float32s_whatever_the_process_has_set(tiny_llama_dir: Path) -> None:
    exact, precisions = Float32LM(packed(tiny_llama_dir, torch.bfloat16)), []
    exact.on_load(
        "model.layers.0.mlp.up_proj", lambda: precisions.append(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("high")
    try:
        probe_states(exact, probes())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == ["highest"]


def test_a_pass_that_fails_leaves_nothing_loaded(tiny_llama_dir: Path) -> None:
    exact = Float32LM(packed(tiny_llama_dir))
    expected = probe_states(exact, probes())

    def fail() -> None:
        raise torch.OutOfMemoryError

    for module in ("self_attn.q_proj", "mlp.down_proj"):
        exact.on_load(f"model.layers.2.{module}", fail)
        with pytest.raises(OutOfMemory):
            probe_states(exact, probes())
        assert all(parameter.is_meta for parameter in exact.model.parameters())
        exact.on_load(f"model.layers.2.{module}", lambda: None)
        assert torch.equal(probe_states(exact, probes()), expected)


def test_states_end_on_the_device_of_the_head(tiny_llama_dir: Path) -> None:
    """A model spread over several devices has its head on the last one."""
    exact = Float32LM(packed(tiny_llama_dir))
    exact.head = torch.nn.Linear(exact.hidden_size, 10, device="meta")
    assert exact.finish(torch.ones(1, 2, exact.hidden_size)).is_meta


class PeakBytes(TorchDispatchMode):
    """The live bytes of the storages that operations make inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if not tensor.is_meta and storage._cdata not in inputs | self._counted:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._counted.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def merge_check_bytes(
    layers: int, hidden: int, intermediate: int, stage: LoraStage, examples: list[Example]
) -> int:
    """Returns the peak of a merge and its check, beyond a bfloat16 Llama of zeros that has these sizes."""
    config = LlamaConfig(
        vocab_size=1_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        attn_implementation=IMPLEMENTATION,
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model = empty.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    lm = PackedLM(model.eval())
    assert stage.target_modules != "auto"
    peft_model = peft_layers.attach(lm, stage, stage.target_modules)
    weights = peft_layers.extract(peft_model, stage, stage.target_modules)
    with PeakBytes() as counted:
        merge_and_verify(lm, peft_model, stage, weights, examples)
    return counted.peak


@pytest.mark.parametrize(
    "modules", [["q_proj", "v_proj"], ["q_proj", "o_proj", "up_proj", "down_proj"]], ids=len
)
def test_the_check_of_a_merge_takes_less_than_a_float32_layer(modules: list[str]) -> None:
    """One weight in float32, the adapter's change and their sum: the number of layers adds only the adapters."""
    stage, hidden, intermediate = LoraStage(target_modules=modules, rank=1), 512, 1_376
    shallow, deep = (merge_check_bytes(layers, hidden, intermediate, stage, probes()) for layers in (1, 4))
    assert 4 * hidden * intermediate < shallow < 4 * (4 * hidden**2 + 3 * hidden * intermediate)
    assert deep < 1.1 * shallow
