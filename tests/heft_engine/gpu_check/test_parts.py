"""The parts of `gpu-check` with small sizes on a CPU: they measure, and they find what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from heft_engine.errors import TrainingError
from heft_engine.gpu_check import agreement, attention, job
from heft_engine.gpu_check.part import Findings, Part, Target
from heft_engine.gpu_check.parts import PARTS
from heft_engine.gpu_check.shapes import LLAMA_2_7B, fitting
from heft_engine.inference.scoring import Scores
from heft_engine.model import varlen_attention

QUICK = ("machine", "attention", "training", "cache", "serving", "memory")


@pytest.fixture
def target() -> Target:
    return Target(device=torch.device("cpu"), small=True)


@pytest.mark.parametrize("name", QUICK)
def test_a_part_passes_on_a_cpu_with_small_sizes(target: Target, name: str) -> None:
    part = next(part for part in PARTS if part.name == name)
    result = part.result(target)
    assert (result["status"], result["failures"]) == ("passed", []), result
    assert result["figures"]


def test_stages_report_their_speed_on_every_cache(target: Target) -> None:
    part = next(part for part in PARTS if part.name == "cache")
    figures = part.result(target)["figures"]
    assert set(figures) == {
        "nothing",
        "states (host)",
        "states (disk)",
        "keys_values (host)",
        "keys_values (disk)",
    }
    assert all(figure["tokens_per_second"] > 0 for figure in figures.values())


def test_families_agree_and_a_wrong_device_is_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "FAMILIES", ["gemma2"])
    findings = Findings()
    agreement.check_agreement(target, findings)
    assert findings.failures == []
    assert findings.figures["gemma2"]["float32"] == {"losses": 0, "gradients": 0, "scores": 0, "tokens": 0}

    score = agreement.score

    def wrong(lm: Any, examples: Any) -> list[Scores]:
        return score(lm, examples if lm.dtype == torch.float32 else examples[::-1])

    monkeypatch.setattr(agreement, "score", wrong)
    findings = Findings()
    agreement.check_agreement(target, findings)
    assert any("gemma2 in bfloat16: scores differ" in failure for failure in findings.failures)


def test_wrong_attention_is_found(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(layer: int, query: Any, key: Any, value: Any, layout: Any, options: Any) -> Any:
        return (query + key + value).transpose(1, 2)

    monkeypatch.setattr(varlen_attention, "is_supported", lambda query, options: True)
    monkeypatch.setattr(varlen_attention, "varlen_attention", uniform)
    findings = Findings()
    attention.check_attention(target, findings)
    assert any("gradients differ" in failure for failure in findings.failures)


@pytest.mark.slow
def test_runs_resume_with_equal_losses_dense_and_in_4_bits(target: Target) -> None:
    findings = Findings()
    job.check_job(target, findings)
    assert findings.failures == []
    assert findings.figures["dense"]["steps"] == findings.figures["nf4"]["steps"] == 12


def test_an_exception_is_a_result_and_keeps_what_was_found(target: Target) -> None:
    def fails(target: Target, findings: Findings) -> None:
        findings.figures["before"] = 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = Part(name="p", title="P", seconds=1, run=fails).result(target)
    assert result["status"] == "error"
    assert result["figures"] == {"before": 1}
    assert "illegal memory access" in result["error"]


def test_the_shape_is_llama_2_7bs_with_fewer_layers_where_memory_is_short() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_2_7B.config())
    assert sum(p.numel() for p in model.parameters()) == LLAMA_2_7B.parameters() == 6_738_415_616
    assert fitting(LLAMA_2_7B, 80 * 10**9) == LLAMA_2_7B
    assert 2 <= fitting(LLAMA_2_7B, 16 * 10**9).layers < 32
    with pytest.raises(TrainingError, match="not even two layers"):
        fitting(LLAMA_2_7B, 10**9)
