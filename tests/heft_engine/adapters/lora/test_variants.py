"""LoRA variants are trained as peft trains them, merged as they were trained, and readable by peft alone."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import LORA, but
from peft import LoraConfig, PeftModel, get_peft_model
from probe_models import bits, packed, probe_logits, probes, same
from pydantic import ValidationError
from real_pyreft import plain
from small_runs import SEED, load_inputs, step_losses, steps_of, train_inputs, yes_no_rows
from torch.testing import assert_close

from heft_engine.adapters.lora import peft_layers as lora
from heft_engine.adapters.lora.adapter import LoraAdapter
from heft_engine.adapters.lora.concat import concatenate
from heft_engine.adapters.lora.merge import merge_and_verify
from heft_engine.adapters.lora.variants import initial_factors, widened
from heft_engine.adapters.lora.weights import ADAPTER_WEIGHTS, LoraWeights, weight_of
from heft_engine.config.train import LoraStage
from heft_engine.data.encoding import Example
from heft_engine.errors import BundleError, ConfigError, TrainingError
from heft_engine.events import Event
from heft_engine.model.packed_lm import PackedLM
from heft_engine.training.schedule import derived_seed

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter_4": {"init": "pissa_niter_4"},
    "olora": {"init": "olora", "use_rslora": True},
    "dora_pissa": {"use_dora": True, "init": "pissa"},
    "dora_olora": {"use_dora": True, "init": "olora"},
}
MODULES = ["q_proj", "v_proj", "up_proj"]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def stage_of(variant: str, **more: Any) -> Any:
    return but(LORA, target_modules=MODULES, rank=4, alpha=8, **VARIANTS[variant], **more)


def trained(lm: PackedLM, stage: LoraStage, seed: int = 0) -> tuple[LoraAdapter, LoraWeights]:
    """Returns an adapter moved from its initial weights, attached to the model, and a copy of its factors."""
    torch.manual_seed(seed)
    trainable = LoraAdapter.attach(lm, stage)
    with torch.no_grad():
        for name, parameter in trainable.parameters().items():
            factor = 0.2 if lora.is_magnitude(name) else 0.1
            parameter.add_(factor * parameter.abs().mean().clamp_min(0.5) * torch.randn(parameter.shape))
    return trainable, lora.extract(trainable.peft_model, stage, MODULES)


def peft_losses(path: Path, stage: LoraStage, steps: list[list[Example]]) -> list[float]:
    """Returns the losses of the same steps by peft's initialisation and forward pass, row by row."""
    torch.manual_seed(derived_seed(SEED, 0))
    config = LoraConfig(
        r=stage.rank,
        lora_alpha=int(stage.alpha),
        target_modules=MODULES,
        use_dora=stage.use_dora,
        use_rslora=stage.use_rslora,
        init_lora_weights=True if stage.init == "default" else stage.init,
    )
    model = get_peft_model(plain(path), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=float(stage.learning_rate), weight_decay=0.0)
    losses = []
    for done, examples in enumerate(steps):
        total, count = torch.zeros(()), 0
        for example in examples:
            answer = example.answers[0]
            ids = torch.tensor([[*example.prompt, *answer]])
            logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            count += len(answer)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = float(stage.learning_rate) * (1 - done / len(steps))
        optimizer.step()
        losses.append(float(total.detach()) / count)
    return losses


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "pissa_niter_4"])
def test_twenty_steps_have_the_losses_of_peft(tiny_llama_dir: Path, tmp_path: Path, variant: str) -> None:
    stage = stage_of(variant, n_epochs=5, batch_size=4, learning_rate=5e-3, warmup_ratio=0.0)
    events: list[Event] = []
    inputs = load_inputs(tiny_llama_dir, [stage], yes_no_rows(16))
    steps = steps_of(inputs)
    train_inputs(inputs, tmp_path / "bundle", events.append)
    losses = step_losses(events)
    assert losses == pytest.approx(peft_losses(tiny_llama_dir, stage, steps), abs=1e-4)
    assert len(losses) == 20
    assert fmean(losses[-4:]) < fmean(losses[:4]) - 0.1


@each_variant
def test_a_model_begins_as_it_was_and_is_left_as_it_was(tiny_llama_dir: Path, variant: str) -> None:
    lm = packed(tiny_llama_dir)
    base, before = bits(lm), probe_logits(lm, probes())
    fresh = LoraAdapter.attach(lm, stage_of(variant))
    assert_close(probe_logits(lm, probes()), before, rtol=0, atol=1e-5)
    lora.detach(fresh.peft_model)
    trainable, _ = trained(lm, stage_of(variant))
    assert (probe_logits(lm, probes()) - before).abs().max() > 0.1
    lora.detach(trainable.peft_model)
    assert same(bits(lm), base)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_merged_is_what_was_trained(tiny_llama_dir: Path, variant: str, dtype: torch.dtype) -> None:
    lm, stage = packed(tiny_llama_dir, dtype), stage_of(variant)
    trainable, adapter = trained(lm, stage)
    as_trained = probe_logits(lm, probes())
    record = merge_and_verify(lm, trainable.peft_model, stage, adapter, probes())
    assert 0 < record.float32 < 1e-4
    if dtype == torch.float32:
        assert_close(probe_logits(lm, probes()), as_trained, rtol=0, atol=1e-4)
    else:
        assert record.served_dtype < 1


def test_a_conversion_that_is_not_the_adapter_fails_the_run(tiny_llama_dir: Path) -> None:
    """Factors as peft converts them for DoRA with PiSSA: B·A of the end without that of the beginning."""
    lm, stage = packed(tiny_llama_dir), stage_of("dora_pissa")
    trainable, adapter = trained(lm, stage)
    for module, (down, up) in adapter.factors.items():
        adapter.factors[module] = (down, torch.cat([up[:, :4] + up[:, 4:], 0 * up[:, 4:]], dim=1))
    with pytest.raises(TrainingError, match="is not the adapter that was trained"):
        merge_and_verify(lm, trainable.peft_model, stage, adapter, probes())


@each_variant
def test_peft_alone_reads_what_is_stored_on_the_original_base(
    tiny_llama_dir: Path, tmp_path: Path, variant: str
) -> None:
    lm, stage = packed(tiny_llama_dir), stage_of(variant)
    trainable, adapter = trained(lm, stage)
    merge_and_verify(lm, trainable.peft_model, stage, adapter, probes())
    adapter.save(tmp_path)
    theirs = PackedLM(PeftModel.from_pretrained(plain(tiny_llama_dir), tmp_path).merge_and_unload())
    theirs.model.config._attn_implementation = lm.model.config._attn_implementation
    assert_close(probe_logits(theirs, probes()), probe_logits(lm, probes()), rtol=0, atol=1e-4)
    again = packed(tiny_llama_dir)
    LoraWeights.load(tmp_path).merge_into(again.model)
    assert same(bits(again), bits(lm))
    assert adapter.rank == (4 if stage.init == "default" else 8)
    assert (adapter.magnitudes is None) != stage.use_dora


@pytest.mark.parametrize(
    "variants", [["dora", "rslora"], ["pissa", "dora_pissa"], ["dora", "olora", "dora_olora"]], ids="-".join
)
def test_stages_with_magnitudes_become_one_adapter(
    tiny_llama_dir: Path, tmp_path: Path, variants: list[str]
) -> None:
    lm, adapters = packed(tiny_llama_dir), []
    for seed, variant in enumerate(variants):
        # Of different layers, so that some modules have had no DoRA.
        stage = stage_of(variant, layers=[0, 1 + seed])
        trainable, adapter = trained(lm, stage, seed)
        merge_and_verify(lm, trainable.peft_model, stage, adapter, probes())
        adapters.append(adapter)
    base = packed(tiny_llama_dir).model
    joined = concatenate(adapters, lambda module: weight_of(base, module))
    joined.save(tmp_path)
    theirs = PackedLM(PeftModel.from_pretrained(plain(tiny_llama_dir), tmp_path).merge_and_unload())
    theirs.model.config._attn_implementation = lm.model.config._attn_implementation
    assert_close(probe_logits(theirs, probes()), probe_logits(lm, probes()), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="without the base's weights"):
        concatenate(adapters)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_factors_begin_at_the_weights_largest_part(init: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 3) @ torch.diag(torch.tensor([9.0, 5.0, 2.0])) @ torch.randn(3, 16)
    down, up = initial_factors(weight, 3, 2.5, init)
    assert (down.shape, up.shape) == ((3, 16), (24, 3))
    scaling = 1.0 if init == "olora" else 2.5  # peft's OLoRA takes s times as much away as there is
    assert_close(scaling * up @ down, weight, rtol=0, atol=1e-4)
    wide_down, wide_up = widened((down + 1, up - 1), (down, up))
    assert_close(wide_up @ wide_down, (up - 1) @ (down + 1) - up @ down, rtol=0, atol=1e-4)


def test_magnitudes_meet_no_weight_decay(tiny_llama_dir: Path) -> None:
    trainable = LoraAdapter.attach(packed(tiny_llama_dir), stage_of("dora"))
    dims = {name: parameter.dim() for name, parameter in trainable.parameters().items()}
    assert len(trainable.no_decay()) == 4 * len(MODULES)
    assert trainable.no_decay() == {name for name, dim in dims.items() if dim == 1}
    assert len(dims) == 3 * len(trainable.no_decay())


def test_a_magnitude_near_one_is_not_rounded_to_one(tiny_llama_dir: Path) -> None:
    """bfloat16 has nothing between 1 and 1.0078."""
    lm = packed(tiny_llama_dir, torch.bfloat16)
    trainable = LoraAdapter.attach(lm, stage_of("dora"))
    before = probe_logits(lm, probes())
    with torch.no_grad():
        for name, parameter in trainable.parameters().items():
            if lora.is_magnitude(name):
                parameter.mul_(1.003)
    assert not torch.equal(probe_logits(lm, probes()), before)


def test_what_no_variant_can_do_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValidationError, match="dropout must be 0 with init pissa or olora"):
        LoraStage(init="pissa", dropout=0.1)
    lm = packed(tiny_llama_dir)
    stage = LoraStage(init="olora", rank=20, target_modules=["v_proj"])
    with pytest.raises(ConfigError, match=r"v_proj is 16 by 32: init olora can't take more") as refused:
        lora.attach(lm, stage, ["v_proj"])
    assert refused.value.param == "lora.rank"


def test_an_adapter_without_its_magnitudes_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    _, adapter = trained(packed(tiny_llama_dir), stage_of("dora"))
    adapter.save(tmp_path)
    weights = tmp_path / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes().replace(b"lora_magnitude_vector", b"lora_magnitude_vectoR"))
    with pytest.raises(BundleError, match="can't be read"):
        LoraWeights.load(tmp_path)
