"""Intruder dimensions: planted ones are found and repaired, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import LORA, REFT, but, config, parse, run, yes_no
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from probe_models import packed, probes
from real_pyreft import plain
from torch import Tensor
from torch.testing import assert_close

from heft_engine.adapters.lora import peft_layers
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.lora.intruders import find, repaired
from heft_engine.adapters.lora.weights import LoraWeights
from heft_engine.config.train import LoraStage
from heft_engine.serving.predictor import load


def weight_of(rows: int = 48, columns: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    return left @ torch.diag(torch.linspace(10, 1, columns)) @ right.T


def direction(size: int, of: Tensor | None = None, seed: int = 1) -> Tensor:
    """A random direction; orthogonal to the columns of `of`, if given."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if of is not None:
        basis, _ = torch.linalg.qr(of)
        vector = vector - basis @ (basis.T @ vector)
    return vector / vector.norm()


def adapter_of(planted: dict[str, tuple[Tensor, Tensor, float]]) -> LoraWeights:
    factors = {
        name: (right[None], strength * left[:, None]) for name, (left, right, strength) in planted.items()
    }
    return LoraWeights(
        factors=factors, scaling=1.0, rank=1, alpha=1.0, target_modules=list(planted), layers=None
    )


def test_a_planted_intruder_is_found_with_its_vectors_and_its_strength() -> None:
    weight = weight_of()
    left, right = direction(48, of=weight), direction(40)
    tuned = weight + 30 * torch.outer(left, right)
    intruders = find(weight, tuned)
    assert intruders.count == 1
    assert abs(float(intruders.left[:, 0] @ left)) > 0.95
    assert float(intruders.values[0]) > 28
    assert_close(intruders.strength(tuned), torch.ones(1), rtol=0, atol=1e-4)
    assert abs(float(intruders.strength(weight))) < 0.35
    assert len(intruders.cosines) == 10


def test_what_is_no_intruder() -> None:
    weight = weight_of()
    assert find(weight, weight).count == 0
    assert find(weight, -weight).count == 0
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    louder = left @ torch.diag(values.flip(0) * 3) @ right
    assert find(weight, louder).count == 0, "another spectrum on the same vectors"
    small = weight + 0.1 * torch.outer(direction(48, of=weight), direction(40))
    assert find(weight, small).count == 0, "not among the ten largest"


@pytest.mark.parametrize("scale", [0.8, 0.0])
def test_a_repair_scales_the_intruders_singular_values_and_nothing_else(scale: float) -> None:
    weights = {"a": weight_of(seed=0), "b": weight_of(seed=2)}
    planted = {
        "a": (direction(48, of=weights["a"]), direction(40), 30.0),
        "b": (direction(48), direction(40), 0.01),
    }
    adapter = adapter_of(planted)
    again, count = repaired(adapter, weights.__getitem__, scale)
    assert (count, again.rank) == (1, 2)
    tuned = adapter.merged("a", weights["a"])
    intruders = find(weights["a"], tuned)
    expected = tuned + (scale - 1) * intruders.values[0] * torch.outer(
        intruders.left[:, 0], intruders.right[0]
    )
    assert_close(again.merged("a", weights["a"]), expected, rtol=0, atol=1e-4)
    assert_close(
        intruders.strength(again.merged("a", weights["a"])), torch.tensor([scale]), rtol=0, atol=1e-4
    )
    assert_close(again.merged("b", weights["b"]), adapter.merged("b", weights["b"]), rtol=0, atol=1e-6)
    assert find(weights["a"], again.merged("a", weights["a"])).count == (1 if scale else 0)


def test_an_adapter_without_intruders_is_left_as_it_is() -> None:
    weight = weight_of()
    adapter = adapter_of({"a": (direction(48), direction(40), 0.01)})
    assert repaired(adapter, lambda _: weight, 0.5) == (adapter, 0)


def test_the_repair_is_pefts_but_for_its_cut_to_the_rank(tiny_llama_dir: Path) -> None:
    """peft's ΔW of rank r is the best approximation of ours, which keeps r + intruders."""
    model = get_peft_model(plain(tiny_llama_dir), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")
    }
    factors = {
        name: (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
        for name, layer in layers.items()
    }
    adapter = LoraWeights(
        factors=factors, scaling=2.0, rank=2, alpha=4, target_modules=["q_proj"], layers=None
    )
    weights = {name: layer.base_layer.weight.detach() for name, layer in layers.items()}
    ours, count = repaired(adapter, weights.__getitem__, 0.75)
    reduce_intruder_dimension(model, mitigation_lambda=0.75, logging_sink=None)
    assert count > 0
    for name, layer in layers.items():
        left, values, right = torch.linalg.svd(ours.delta(name), full_matrices=False)
        cut = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        assert_close(layer.get_delta_weight("intruder_reduced"), cut, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_run_repairs_between_its_stages_and_its_bundle_holds_the_repair(
    tiny_llama_dir: Path, tmp_path: Path, use_dora: bool
) -> None:
    strong = but(LORA, learning_rate=0.05, alpha=64, n_epochs=1, use_dora=use_dora)
    stages = [but(strong, merge={"intruder_scale": 0.5}), but(REFT, n_epochs=1)]
    record = run(config(tiny_llama_dir, "heft", stages), tmp_path / "out", None, parse(yes_no(8, seed=1)))
    merge = record.one("MERGE_VERIFIED")
    assert merge["intruders"] > 0
    assert merge["intruder_scale"] == 0.5
    assert merge["float32"] < 1e-3
    predictor = load(tmp_path / "out", device="cpu")  # checks the probe rows
    assert record.bundle is not None
    (adapter,) = record.bundle.adapters
    assert adapter.rank > stages[0].rank
    assert (adapter.magnitudes is not None) == use_dora
    assert all(torch.isfinite(p).all() for p in predictor.lm.model.parameters())


def test_a_merge_without_a_scale_is_what_was_trained(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    stage = LoraStage(target_modules=["q_proj"])
    trainable = LoraAdapter.attach(lm, stage)
    trained = peft_layers.extract(trainable.peft_model, stage, ["q_proj"])
    merge = trainable.finish(probes())
    for name, pair in trained.factors.items():
        assert all(map(torch.equal, pair, merge.weights.factors[name]))
    assert "intruders" not in merge.record
