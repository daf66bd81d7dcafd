"""The command `plan`: what a run would take of a GPU, from a configuration without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_runs import LORA, REFT, but, config, run
from tiny_models import tiny_config

from heft_engine.commands.main import main

GB = 10**9


def write_config(path: Path, layers: int) -> Path:
    """Writes the configuration of Llama-2-7B's shape with so many layers, and nothing else."""
    sizes = {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "vocab_size": 32_000, "max_position_embeddings": 4_096}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    return path


@pytest.fixture
def llama_7b(tmp_path: Path) -> Path:
    return write_config(tmp_path, 32)


@pytest.fixture
def three_layers(tmp_path: Path) -> Path:
    """Weights of 1.7 GB."""
    return write_config(tmp_path, 3)


def plan(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str, gpu: str = "24GB") -> Any:
    common = ["--rows", "9427", "--row-tokens", "160", "--gpu", gpu, "--host-memory", "64GB", "--json"]
    assert main(["plan", "--model", str(model), *common, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_papers_job_on_one_card_of_24_gb(capsys: pytest.CaptureFixture[str], llama_7b: Path) -> None:
    answer = plan(capsys, llama_7b, "--tflops", "100")
    assert answer["fits"]
    lora, reft = answer["stages"]
    assert (lora["type"], reft["type"]) == ("lora", "reft")
    # 6,738,415,616 weights of two bytes; q and v of 32 layers, rank 8; LoReFT's R, W and b.
    assert lora["weight_bytes"] == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert lora["trained_parameters"] == 32 * 2 * 2 * 8 * 4_096
    assert reft["trained_parameters"] == 2 * 4 * 4_096 + 4
    for stage in (lora, reft):
        assert stage["weight_bytes"] < stage["gpu_bytes"] < 22 * GB
        assert stage["seconds"] == pytest.approx(stage["flops"] / 1e14, abs=0.1)
    # Every token's hidden state at layer 16, in bfloat16.
    assert reft["cache"]["level"] == "states"
    assert reft["cache"]["bytes"] == pytest.approx(9_427 * 160 * 4_096 * 2, rel=0.01)
    # Four operations a weight and token: forward and backward through a frozen base (3 epochs).
    assert lora["flops"] == pytest.approx(4 * 6.5e9 * 3 * 9_427 * 160, rel=0.1)


def test_a_card_that_is_too_small_is_told_so_and_4_bits_fit_it(
    capsys: pytest.CaptureFixture[str], llama_7b: Path
) -> None:
    dense = plan(capsys, llama_7b, gpu="12GB")
    assert not dense["fits"]
    assert "the weights alone take 13.5 GB" in dense["stages"][0]["error"]
    assert "gpu_bytes" not in dense["stages"][0]
    quantized = plan(capsys, llama_7b, "--set", "base_quantization=nf4", gpu="12GB")
    assert quantized["fits"]
    lora, reft = quantized["stages"]
    # Half a byte and a 64th of a float a weight in the layers; the head and the embeddings as they were.
    layers, rest = 6_476_005_376, 262_144_000
    assert lora["weight_bytes"] == pytest.approx(layers * (1 / 2 + 4 / 64) + 2 * rest, rel=0.01)
    # Merged weights are stored whole.
    merged = 32 * 2 * 4_096**2
    assert reft["weight_bytes"] - lora["weight_bytes"] == pytest.approx(merged * (2 - 0.5625), rel=0.01)


def test_a_merge_that_would_not_fit_is_refused_before_the_stage(
    capsys: pytest.CaptureFixture[str], llama_7b: Path
) -> None:
    """All linear modules are 13 GB once they are whole."""
    modules = '["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]'
    settings = [
        "--method",
        "lora",
        "--set",
        "base_quantization=nf4",
        "--set",
        f"lora.target_modules={modules}",
    ]
    (stage,) = plan(capsys, llama_7b, *settings, gpu="12GB")["stages"]
    assert "merging stage lora needs" in stage["error"]
    assert "adapt fewer modules" in stage["error"]
    (stage,) = plan(capsys, llama_7b, *settings, gpu="24GB")["stages"]
    assert stage["fits"]
    assert stage["gpu_bytes"] > 2 * 6_476_005_376


def test_rows_are_truncated_as_in_training(capsys: pytest.CaptureFixture[str], three_layers: Path) -> None:
    long = plan(capsys, three_layers, "--rows", "200", "--longest-row", "100000")["stages"][0]
    short = plan(capsys, three_layers, "--rows", "200", "--longest-row", "100000", "--set", "max_length=512")[
        "stages"
    ][0]
    assert short["gpu_bytes"] < long["gpu_bytes"]


def test_several_cards_train_in_parallel_or_share_the_layers(
    capsys: pytest.CaptureFixture[str], three_layers: Path
) -> None:
    one = plan(capsys, three_layers, "--rows", "200", "--tflops", "100")["stages"][0]
    eight = plan(capsys, three_layers, "--rows", "200", "--gpus", "8", "--tflops", "100")["stages"][0]
    assert eight["placement"] == "data parallel"
    assert eight["seconds"] == pytest.approx(one["seconds"] / 8, rel=0.01)
    small = plan(capsys, three_layers, "--rows", "200", "--gpus", "8", gpu="2.4GB")["stages"]
    assert [stage["placement"] for stage in small] == ["spread", "spread"]
    assert small[0]["weight_bytes"] == one["weight_bytes"] // 8


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3"])
def test_other_families(capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    assert plan(capsys, tmp_path, "--method", "heft_interleaved")["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "much"], "'much' is no size: write it as 24GB or 24GiB"),
        (["--rows", "0"], "'0' is not a positive number"),
        (["--tflops", "0"], "'0' is not a positive number"),
        (["--tflops", "nan"], "'nan' is not a positive number"),
    ],
)
def test_bad_arguments_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    common = {"--rows": "10", "--row-tokens": "20", "--gpu": "24GB", "--host-memory": "64GB"}
    values = common | dict([arguments])
    flat = [part for pair in values.items() for part in pair]
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path), *flat])
    assert message in capsys.readouterr().err


def test_settings_that_do_not_fit_the_model_are_refused(
    capsys: pytest.CaptureFixture[str], llama_7b: Path
) -> None:
    common = ["--rows", "10", "--row-tokens", "20", "--gpu", "24GB", "--host-memory", "64GB"]
    assert main(["plan", "--model", str(llama_7b), *common, "--set", "reft.layers=40"]) == 1
    error = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]
    assert error["param"] == "reft.layers"
    assert main(["plan", "--model", str(llama_7b), *common, "--longest-row", "9"]) == 1
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["param"] == "longest_row"


def test_a_bundle_is_planned_by_its_base_with_its_stages_in_place(
    capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    both = [but(LORA, n_epochs=1), but(REFT, n_epochs=1)]
    run(config(tiny_llama_dir, "recipe", both, base_quantization="nf4"), tmp_path / "bundle")
    settings = ["--set", "dtype=float32", "--set", "base_quantization=nf4"]
    whole = plan(capsys, tiny_llama_dir, "--method", "heft", *settings)["stages"]
    (second,) = plan(capsys, tmp_path / "bundle", "--method", "reft")["stages"]
    assert second["weight_bytes"] == whole[1]["weight_bytes"] > whole[0]["weight_bytes"], (
        "merged, they are whole"
    )
    arguments = ["--rows", "9", "--row-tokens", "9", "--gpu", "24GB", "--host-memory", "9GB"]
    assert main(["plan", "--model", str(tmp_path / "bundle"), *arguments, "--set", "dtype=bfloat16"]) == 1
    assert "dtype must be auto or float32" in capsys.readouterr().err
