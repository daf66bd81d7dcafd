"""LoRA layers of peft: attached to the chosen modules, merged as they were trained, saved as peft reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from probe_models import bits, packed, probe_logits, probes, same
from tiny_models import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from heft_engine.adapters import parity
from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.adapters.lora.concat import concatenate
from heft_engine.adapters.lora.merge import merge_and_verify
from heft_engine.adapters.lora.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraWeights
from heft_engine.config.train import LoraStage
from heft_engine.errors import BundleError, ConfigError, TrainingError
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.auto_settings import resolve_stage
from heft_engine.model.packed_lm import PackedLM

MakeModel = Callable[[str], Path]
Merging = Callable[[LoraWeights, nn.Module], None]


def trained(lm: PackedLM, stage: LoraStage, seed: int = 0) -> tuple[Any, LoraWeights]:
    """Returns a model with an adapter of random factors, and a copy of the adapter."""
    assert stage.target_modules != "auto"
    adapted = lora.attach(lm, stage, stage.target_modules)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.trainable(adapted).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted, lora.extract(adapted, stage, stage.target_modules)


def auto(lm: PackedLM, **settings: Any) -> LoraStage:
    stage = LoraStage(**settings)
    sizes = {"n_layers": lm.n_layers, "hidden_size": lm.hidden_size, "parameters": lm.parameters}
    resolved = resolve_stage(stage, lm.family, **sizes)
    assert isinstance(resolved, LoraStage)
    return resolved


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_adapted_one(make_tiny_model: MakeModel, family: str) -> None:
    lm = packed(make_tiny_model(family))
    base, before = bits(lm), probe_logits(lm, probes())
    adapted, adapter = trained(lm, auto(lm))
    with_adapter = probe_logits(lm, probes())
    assert (with_adapter - before).abs().max() > 0.1
    lora.detach(adapted)
    assert same(bits(lm), base), "taking an adapter out leaves the base as it was"
    adapter.merge_into(lm.model)
    torch.testing.assert_close(probe_logits(lm, probes()), with_adapter, atol=1e-4, rtol=0)
    changed = {name for name in base if not torch.equal(base[name], bits(lm)[name])}
    assert changed == {f"{module}.weight" for module in adapter.factors}
    assert len(changed) == lm.n_layers * len(lm.family.attention)


def test_only_the_chosen_layers_and_modules_get_an_adapter(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    _, adapter = trained(lm, LoraStage(target_modules=["o_proj", "mlp.up_proj"], layers=[1, 3]))
    names = {f"model.layers.{i}.{name}" for i in (1, 3) for name in ("self_attn.o_proj", "mlp.up_proj")}
    assert set(adapter.factors) == names
    assert adapter.factors["model.layers.1.mlp.up_proj"][0].shape == (8, 32)
    assert adapter.factors["model.layers.1.mlp.up_proj"][1].shape == (64, 8)


def test_a_merge_adds_in_float32_and_rounds_once(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir, torch.bfloat16)
    stage = LoraStage(target_modules=["q_proj"], rank=2, alpha=6)
    adapted, adapter = trained(lm, stage)
    lora.detach(adapted)
    module = "model.layers.2.self_attn.q_proj"
    weight = bits(lm)[f"{module}.weight"]
    down, up = adapter.factors[module]
    assert down.dtype == up.dtype == torch.float32
    adapter.merge_into(lm.model)
    exact = weight.float() + 3.0 * (up @ down)
    assert torch.equal(bits(lm)[f"{module}.weight"], exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_parity_record_holds_a_merge_to_its_limit(tiny_llama_dir: Path, dtype: torch.dtype) -> None:
    lm = packed(tiny_llama_dir, dtype)
    adapted, adapter = trained(lm, auto(lm))
    record = merge_and_verify(lm, adapted, auto(lm), adapter, probes())
    assert (record.dtype, record.rows, record.limit) == (str(dtype)[6:], 3, 1e-3)
    assert 0 < record.float32 < 1e-4
    if dtype == torch.float32:
        assert record.served_dtype == record.float32
        assert record.dtype_noise == 0
    else:
        assert record.float32 < record.served_dtype < 1
        assert record.float32 < record.dtype_noise < 1


def test_probe_rows_run_a_few_at_a_time(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model that has been trained there is no room for one pass over eight long rows."""
    lm, passes = packed(tiny_llama_dir), []
    together = probe_logits(lm, probes())
    lm.on_forward = lambda: passes.append(1)
    monkeypatch.setattr(parity, "TOKEN_BUDGET", 1)
    torch.testing.assert_close(probe_logits(lm, probes()), together, atol=1e-5, rtol=0)
    assert len(passes) == len(probes()) > 1


def test_dropout_has_no_part_in_the_comparison(tiny_llama_dir: Path) -> None:
    lm = packed(tiny_llama_dir)
    stage = auto(lm, dropout=0.5)
    adapted, adapter = trained(lm, stage)
    adapted.eval()  # as training leaves it
    assert 0 < merge_and_verify(lm, adapted, stage, adapter, probes()).float32 < 1e-4


def scaled_merge(merge: Merging, weights: LoraWeights, model: nn.Module) -> None:
    merge(replace(weights, scaling=weights.scaling * 1.01), model)


def merge_of_the_first_module(merge: Merging, weights: LoraWeights, model: nn.Module) -> None:
    merge(weights.of_module(next(iter(weights.factors))), model)


def repeated_merge(merge: Merging, weights: LoraWeights, model: nn.Module) -> None:
    merge(weights, model)
    merge(weights, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("damaged", [scaled_merge, merge_of_the_first_module, repeated_merge])
def test_a_merge_that_is_not_the_adapter_fails_the_run(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, damaged: Any, dtype: torch.dtype
) -> None:
    lm = packed(tiny_llama_dir, dtype)
    adapted, adapter = trained(lm, auto(lm))
    merge_into = LoraWeights.merge_into
    monkeypatch.setattr(LoraWeights, "merge_into", lambda self, model: damaged(merge_into, self, model))
    with pytest.raises(TrainingError, match="trained") as broken:
        merge_and_verify(lm, adapted, auto(lm), adapter, probes())
    assert broken.value.code == "parity_broken"


@pytest.mark.parametrize("damaged", [scaled_merge, merge_of_the_first_module])
def test_a_merge_into_the_model_is_the_one_that_was_compared(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, damaged: Any
) -> None:
    """Rounding to bfloat16 hides from logits what happens to the model alone; its weights' bits show it."""
    lm = packed(tiny_llama_dir, torch.bfloat16)
    adapted, adapter = trained(lm, auto(lm))
    merge_into = LoraWeights.merge_into

    def damaged_in_the_model(self: LoraWeights, model: nn.Module) -> None:
        damaged(merge_into, self, model) if model is lm.model else merge_into(self, model)

    monkeypatch.setattr(LoraWeights, "merge_into", damaged_in_the_model)
    with pytest.raises(TrainingError, match="are not those that were compared") as broken:
        merge_and_verify(lm, adapted, auto(lm), adapter, probes())
    assert broken.value.code == "parity_broken"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_a_merge_holds_for_every_family(make_tiny_model: MakeModel, family: str) -> None:
    lm = packed(make_tiny_model(family), torch.bfloat16)
    adapted, adapter = trained(lm, auto(lm))
    record = merge_and_verify(lm, adapted, auto(lm), adapter, probes())
    assert 0 < record.float32 < 1e-4 < record.dtype_noise < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stages_replayed_from_files_give_equal_bits(
    tiny_llama_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    lm, adapters = packed(tiny_llama_dir, dtype), []
    stages = [LoraStage(target_modules=["q_proj", "v_proj"]), LoraStage(target_modules=["up_proj"], rank=3)]
    for seed, stage in enumerate([*stages, stages[0]]):
        adapted, adapter = trained(lm, stage, seed)
        merge_and_verify(lm, adapted, stage, adapter, probes())
        adapter.save(tmp_path / str(seed))
        adapters.append(adapter)
    again = packed(tiny_llama_dir, dtype)
    for seed in range(3):
        LoraWeights.load(tmp_path / str(seed)).merge_into(again.model)
    assert same(bits(again), bits(lm))


def test_what_is_saved_is_what_peft_reads(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Several stages joined into one: ΔW is their sum, for peft too."""
    stages = [
        LoraStage(target_modules=["q_proj", "v_proj"], layers=[0, 2]),
        LoraStage(target_modules=["o_proj"]),
    ]
    adapters = []
    for seed, stage in enumerate([*stages, stages[0]]):
        lm = packed(tiny_llama_dir)
        adapters.append(trained(lm, stage, seed)[1])
    joined = concatenate(adapters)
    assert (joined.rank, joined.scaling) == (24, 1.0)
    merged = packed(tiny_llama_dir)
    for adapter in adapters:
        adapter.merge_into(merged.model)
    for module in joined.factors:
        total = sum(a.delta(module) for a in adapters if module in a.factors)
        torch.testing.assert_close(joined.delta(module), total, atol=1e-5, rtol=0)
    joined.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation=IMPLEMENTATION)
    theirs = PackedLM(PeftModel.from_pretrained(base, tmp_path).merge_and_unload())
    torch.testing.assert_close(
        probe_logits(theirs, probes()), probe_logits(merged, probes()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "wrong", [["nonsense"], ["q_proj", "nonsense"], ["lm_head"], ["embed_tokens"], ["norm"]]
)
def test_modules_that_a_models_layers_do_not_have_are_refused(tiny_llama_dir: Path, wrong: list[str]) -> None:
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=f"is named {wrong[-1]}; they have {known}") as refused:
        lora.attach(packed(tiny_llama_dir), LoraStage(target_modules=wrong), wrong)
    assert refused.value.param == "lora.target_modules"


def test_a_foreign_adapter_is_refused(make_tiny_model: MakeModel) -> None:
    llama, neox = packed(make_tiny_model("llama")), packed(make_tiny_model("gpt_neox"))
    with pytest.raises(
        BundleError, match=r"names model\.layers\.0\.self_attn\.q_proj, which is no linear layer of this base"
    ):
        trained(llama, auto(llama))[1].merge_into(neox.model)
    narrow = trained(packed(make_tiny_model("llama")), LoraStage(target_modules=["up_proj"]))[1]
    down, up = narrow.factors["model.layers.0.mlp.up_proj"]
    narrow.factors["model.layers.0.mlp.up_proj"] = (down, torch.cat([up, up]))
    with pytest.raises(BundleError, match=r"up_proj is \(128, 32\), the base's \(64, 32\)"):
        narrow.merge_into(packed(make_tiny_model("llama")).model)


@pytest.mark.parametrize("damage", ["no config", "no rank", "no weights", "cut", "half"])
def test_a_damaged_adapter_is_refused(tiny_llama_dir: Path, tmp_path: Path, damage: str) -> None:
    trained(packed(tiny_llama_dir), LoraStage(target_modules=["q_proj"]))[1].save(tmp_path)
    config, weights = tmp_path / ADAPTER_CONFIG, tmp_path / ADAPTER_WEIGHTS
    match damage:
        case "no config":
            config.unlink()
        case "no rank":
            config.write_text(
                json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "r"})
            )
        case "no weights":
            weights.unlink()
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-10])
        case _:
            weights.write_bytes(weights.read_bytes().replace(b".lora_B.", b".lora_C."))
    with pytest.raises(BundleError, match="can't be read"):
        LoraWeights.load(tmp_path)
