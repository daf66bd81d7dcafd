"""Runs on a base in 4 bits equal those on the dense model with its dequantised weights, up to every export."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from engine_runs import (
    LORA,
    REFT,
    RunRecord,
    assert_equal,
    but,
    config,
    interrupted,
    parse,
    run,
    tensors,
    yes_no,
)
from pydantic import ValidationError
from torch.testing import assert_close

from heft_engine.bundle.assemble import assemble
from heft_engine.bundle.export import export
from heft_engine.config.train import BaseQuantization, LoraStage, ReftStage, TrainConfig
from heft_engine.model import nf4
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, load_tokenizer, resolve_path
from heft_engine.serving.batcher import Batcher
from heft_engine.serving.model_pool import ModelPool
from heft_engine.serving.predictor import Prediction, load
from heft_engine.training.setup import load as load_run
from heft_engine.training.stage_cache import activation_key, stage_keys
from heft_engine.training.stage_inputs import attach_stage

ROWS = parse(yes_no(6, seed=5))
STAGES: dict[str, list[LoraStage | ReftStage]] = {
    "heft": [LORA, REFT],
    "dora, then lora on other modules": [
        but(LORA, use_dora=True, learning_rate=2e-2),
        but(LORA, target_modules=["v_proj", "down_proj"]),
        REFT,
    ],
    "pissa, repaired": [but(LORA, init="pissa", merge={"intruder_scale": 0.5})],
}


@pytest.fixture(scope="module")
def dense_dir(make_tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with the weights that it has in 4 bits, stored as any other model."""
    folder = tmp_path_factory.mktemp("dense")
    base = resolve_path(make_tiny_model("llama"))
    model: Any = load_model(base, dtype=torch.float32, attention=IMPLEMENTATION, quantization="nf4")
    nf4.store_dense(model)
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    load_tokenizer(base.path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def heft(make_tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    settings = config(make_tiny_model("llama"), base_quantization="nf4")
    return run(settings, tmp_path_factory.mktemp("heft") / "bundle")


def probabilities(predictions: list[Prediction]) -> torch.Tensor:
    return torch.tensor([prediction.probability for prediction in predictions])


@pytest.mark.parametrize("recipe", STAGES)
def test_a_run_in_4_bits_is_the_run_on_its_dequantised_weights(
    tiny_llama_dir: Path, dense_dir: Path, tmp_path: Path, recipe: str
) -> None:
    quantized = run(
        config(tiny_llama_dir, "recipe", STAGES[recipe], base_quantization="nf4"), tmp_path / "nf4"
    )
    dense = run(config(dense_dir, "recipe", STAGES[recipe]), tmp_path / "dense")
    assert quantized.losses.keys() == dense.losses.keys()
    assert_close(list(quantized.losses.values()), list(dense.losses.values()), rtol=1e-4, atol=1e-5)
    trained = tensors(dense)
    assert tensors(quantized).keys() == trained.keys()
    for name, tensor in tensors(quantized).items():
        assert_close(tensor, trained[name], rtol=1e-3, atol=1e-3, msg=name)
    for cost, other in zip(quantized.data("STAGE_COMPLETED"), dense.data("STAGE_COMPLETED"), strict=True):
        assert cost["cost"]["flops"] == other["cost"]["flops"]
    assert quantized.bundle is not None
    assert quantized.bundle.info.base_quantization == "nf4"
    merges = [stage for stage in STAGES[recipe] if stage.type == "lora"]
    assert len(quantized.bundle.info.parity) == len(merges)
    answers = load(tmp_path / "nf4").predict(ROWS)
    assert_close(
        probabilities(answers), probabilities(load(tmp_path / "dense").predict(ROWS)), rtol=0, atol=1e-3
    )


def test_a_stopped_run_resumes_with_equal_bits(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = config(tiny_llama_dir, base_quantization="nf4")
    whole = run(settings, tmp_path / "whole")
    stops = sorted(random.Random(0).sample(range(1, len(whole.losses)), 3))
    losses, last = interrupted(settings, tmp_path, stops)
    assert losses == whole.losses
    assert_equal(last, whole)


def test_one_base_in_4_bits_serves_models_merged_and_unmerged(heft: RunRecord) -> None:
    assert heft.bundle is not None
    path = heft.bundle.path
    expected = probabilities(load(path, device="cpu").predict(ROWS))
    pool = ModelPool(batcher=Batcher(prefix_bytes=0), budget_bytes=2**40, placement="shared", device="cpu")
    try:
        with pool.model("shared", lambda: _Folder(path)) as predictor:
            base = predictor.variant.lm.model
            assert predictor.variant.adapter is not None
            assert_close(probabilities(predictor.predict(ROWS)), expected, rtol=0, atol=1e-4)
        pool._placement = "merged"
        with pool.model("merged", lambda: _Folder(path)) as predictor:
            merged = predictor.variant.lm.model
            assert predictor.variant.adapter is None
            assert_close(probabilities(predictor.predict(ROWS)), expected, rtol=0, atol=1e-4)
        layers = [model.model.layers[0] for model in (base, merged)]
        mlp, attention = ([getattr(layer, name) for layer in layers] for name in ("mlp", "self_attn"))
        assert mlp[0].up_proj.packed.data_ptr() == mlp[1].up_proj.packed.data_ptr()
        assert [part.q_proj.is_quantized for part in attention] == [True, False]
        with pool.model("shared", lambda: _Folder(path)) as predictor:
            assert_close(probabilities(predictor.predict(ROWS)), expected, rtol=0, atol=1e-4)
    finally:
        pool.close()


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        pass


def test_merged_weights_load_in_transformers_dense(heft: RunRecord, tmp_path: Path) -> None:
    assert heft.bundle is not None
    export(heft.bundle.path, "merged", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(model.config, "quantization_config")
    served = load(heft.bundle.path).lm.model
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(tensor, getattr(served.get_submodule(module), leaf)), name


def test_an_adapter_loads_in_peft_on_bitsandbytes_own_layers(
    heft: RunRecord, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    assert heft.bundle is not None
    export(heft.bundle.path, "peft", tmp_path / "adapter")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir,
        dtype=torch.float32,
        quantization_config=nf4.loading_config(torch.float32),
        device_map={"": "cpu"},
    ).train()  # in eval() bitsandbytes' product for CPUs refuses layers as small as these
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        base = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").train()(ids).logits
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    merged: Any = load(heft.bundle.path).lm.model
    merged.config._attn_implementation = "sdpa"
    with torch.no_grad():
        assert_close(adapted, merged(ids).logits, rtol=0, atol=1e-3)
    assert (adapted - base).abs().max() > 0.01


def test_stage_results_of_the_dense_base_are_not_taken_for_those_of_4_bits(tiny_llama_dir: Path) -> None:
    rows = parse(yes_no(8))
    keys, activation_keys = set(), set()
    quantizations: tuple[BaseQuantization | None, ...] = (None, "nf4")
    for quantization in quantizations:
        settings = config(tiny_llama_dir, "reft", base_quantization=quantization)
        inputs = load_run(settings, resolve_path(tiny_llama_dir), rows, (), (), "cpu")
        keys |= set(stage_keys(inputs))
        stage = attach_stage(inputs, 0)
        activation_keys.add(activation_key(inputs, (), stage, inputs.examples, "owner"))
    assert len(keys) == len(activation_keys) == 2


def test_a_run_in_bfloat16_ends_with_a_bundle_that_answers_as_in_training(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = config(tiny_llama_dir, base_quantization="nf4").model_copy(update={"dtype": "bfloat16"})
    record = run(settings, tmp_path / "bundle")
    assert record.bundle is not None
    assert record.bundle.info.versions.keys() >= {"bitsandbytes"}
    assert load(tmp_path / "bundle").lm.dtype == torch.bfloat16  # its probe rows agree, or this raises


def test_in_another_dtype_a_bundle_has_the_codes_that_it_was_trained_on(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = config(tiny_llama_dir, base_quantization="nf4").model_copy(update={"dtype": "bfloat16"})
    bundle = run(settings, tmp_path / "bundle").bundle
    assert bundle is not None
    trained, exact = assemble(bundle), assemble(bundle, dtype=torch.float32)
    weights = [lm.model.get_submodule("model.layers.1.mlp.up_proj").weight for lm in (trained, exact)]
    assert torch.equal(weights[0].float(), weights[1])
    assert exact.dtype == torch.float32


def test_peft_knows_bitsandbytes_beside_this_engine() -> None:
    assert peft.import_utils.is_bnb_available()
    assert peft.import_utils.is_bnb_4bit_available()


def test_compiling_quantised_layers_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValidationError, match="compile must be false or auto with base_quantization"):
        TrainConfig(model=str(tiny_llama_dir), stages=[LORA], base_quantization="nf4", compile=True)
