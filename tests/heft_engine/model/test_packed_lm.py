"""Packed rows have the logits of transformers' forward, whatever lies beside a row."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from heft_engine.adapters.reft import LoreftIntervention
from heft_engine.data.encoding import Example
from heft_engine.errors import ModelError
from heft_engine.inference.greedy import generate
from heft_engine.model.attention import IMPLEMENTATION, packed_attention
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.families import family_of
from heft_engine.model.interventions import PlacedIntervention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import pack

WINDOW = 16  #: of the tiny models that have one
TOLERANCE = 2e-5
MakeModel = Callable[[str], Path]


def packed(path: Path) -> PackedLM:
    return PackedLM(load_model(resolve_path(path), dtype=torch.float32, attention=IMPLEMENTATION))


def reference(path: Path) -> Any:
    """The model as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    chance = random.Random(f"{length}/{seed}")
    return tuple(chance.randrange(5, 600) for _ in range(length))


def example(prompt: int, *answers: int) -> Example:
    """An example whose prompt and answers have these numbers of tokens."""
    branches = tuple(tokens(length, seed=i + 1) for i, length in enumerate(answers))
    return Example(
        prompt=tokens(prompt), answers=branches, labels=tuple(map(str, range(len(answers)))), gold=None
    )


@torch.inference_mode()
def packed_logits(lm: PackedLM, examples: Sequence[Example], scale: float = 1.0) -> list[list[Tensor]]:
    """The logits that predict the tokens of each example's answers: (len(answer), vocabulary) each."""
    batch = pack(examples, scale=scale)
    logits = lm.logits(lm.hidden(batch))
    return [[logits[list(read)] for read in reads] for reads in batch.reads]


@torch.inference_mode()
def reference_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The same logits for one row, alone, by transformers' forward."""
    logits: Tensor = model(torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1]


def intervention(hidden_size: int, seed: int = 0) -> LoreftIntervention:
    """A random frozen intervention, strong enough to change the logits."""
    torch.manual_seed(seed)
    module = LoreftIntervention(hidden_size, 4)
    torch.nn.init.normal_(module.bias)
    module.freeze()
    return module.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_logits_of_the_familys_own_forward(
    make_tiny_model: MakeModel, family: str
) -> None:
    """Rows shorter and longer than the window, side by side; and branches, each as if it stood alone."""
    path = make_tiny_model(family)
    lm, model = packed(path), reference(path)
    rows = [
        example(5, 3),
        example(3 * WINDOW, 2),
        example(WINDOW, 30),
        example(40, 1, 4, 20, 1),
        example(2, 1, 2),
    ]
    for row, ours in zip(rows, packed_logits(lm, rows), strict=True):
        for answer, logits in zip(row.answers, ours, strict=True):
            theirs = reference_logits(model, row.prompt, answer)
            assert theirs.std() > 0.1, "a model whose logits are all alike would hide any error"
            torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_the_window_matters_at_the_lengths_tested(make_tiny_model: MakeModel, family: str) -> None:
    """Without this, the test above could pass by luck."""
    path = make_tiny_model(family)
    lm, row = packed(path), example(3 * WINDOW, 2)
    windowed = packed_logits(lm, [row])[0][0]
    lm.config.sliding_window = None  # Mistral reads it here, the others from each layer
    for layer in lm.layers:
        layer.self_attn.sliding_window = None
    assert (packed_logits(lm, [row])[0][0] - windowed).abs().max() > 0.01


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemmas_soft_caps_are_applied(make_tiny_model: MakeModel, name: str) -> None:
    path = make_tiny_model("gemma2")
    lm, model, row = packed(path), reference(path), example(3 * WINDOW, 3, 2)
    usual = packed_logits(lm, [row])[0]
    for hf_model in (lm.model, model):
        setattr(hf_model.config, name, 0.5)
        for layer in hf_model.model.layers:
            if name.startswith("attn"):
                layer.self_attn.attn_logit_softcapping = 0.5
    for answer, logits, before in zip(row.answers, packed_logits(lm, [row])[0], usual, strict=True):
        torch.testing.assert_close(
            logits, reference_logits(model, row.prompt, answer), atol=TOLERANCE, rtol=0
        )
        assert (logits - before).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_on_the_cache_says_what_recomputation_says(make_tiny_model: MakeModel, family: str) -> None:
    """Decoding runs past the window, with an intervention that acts on the prompt alone."""
    path = make_tiny_model(family)
    lm, model = packed(path), reference(path)
    prompt = example(WINDOW + 5)
    assert generate(lm, [prompt], eos_tokens={-1}, max_new_tokens=[24]) == [
        greedy(lambda answer: reference_logits(model, prompt.prompt, (*answer, 0))[-1])
    ]
    lm.interventions.add(
        PlacedIntervention(layer=1, positions="f1+l1", intervention=intervention(lm.hidden_size))
    )

    def recompute(answer: tuple[int, ...]) -> Tensor:
        row = Example(prompt=prompt.prompt, answers=((*answer, 0),), labels=("",), gold=0)
        return packed_logits(lm, [row])[0][0][-1]

    (edited,) = generate(lm, [prompt], eos_tokens={-1}, max_new_tokens=[24])
    assert edited == greedy(recompute)
    (shorter,) = generate(lm, [prompt], eos_tokens={edited[5]}, max_new_tokens=[24])
    assert shorter == edited[: edited.index(edited[5])]


def greedy(logits: Callable[[tuple[int, ...]], Tensor]) -> list[int]:
    answer: tuple[int, ...] = ()
    for _ in range(24):
        answer = (*answer, int(logits(answer).argmax()))
    return list(answer)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_interventions_edit_the_layers_output_at_prompt_tokens(
    make_tiny_model: MakeModel, family: str
) -> None:
    path = make_tiny_model(family)
    lm, model = packed(path), reference(path)
    edit = intervention(lm.hidden_size)
    lm.interventions.add(PlacedIntervention(layer=1, positions="f2+l1", intervention=edit))
    rows = [example(9, 3), example(3 * WINDOW, 2, 5), example(20, 1)]

    def hook(module: Any, arguments: Any, output: Tensor) -> Tensor:
        places = [0, 1, prompt_length - 1]
        output[:, places] = edit(output[:, places])
        return output

    layers = model.gpt_neox.layers if family == "gpt_neox" else model.model.layers
    layers[1].register_forward_hook(hook)
    for row, ours in zip(rows, packed_logits(lm, rows), strict=True):
        prompt_length = len(row.prompt)
        for answer, logits in zip(row.answers, ours, strict=True):
            theirs = reference_logits(model, row.prompt, answer)
            torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=0)


def test_scale_goes_from_the_plain_model_to_the_edited_one(tiny_llama_dir: Path) -> None:
    lm, rows = packed(tiny_llama_dir), [example(9, 3), example(30, 2, 2)]
    plain = packed_logits(lm, rows)
    lm.interventions.add(
        PlacedIntervention(layer=1, positions="l1", intervention=intervention(lm.hidden_size))
    )
    moved = {s: packed_logits(lm, rows, scale=s) for s in (0.0, 0.5, 1.0)}
    for i, row in enumerate(rows):
        for j in range(len(row.answers)):
            assert torch.equal(moved[0.0][i][j], plain[i][j])
            half, full = ((moved[s][i][j] - plain[i][j]).abs().max() for s in (0.5, 1.0))
            assert 0.01 < half < full


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("head_mask", {"head_mask": torch.ones(1)}),
        ("masks and dropout", {"dropout": 0.1}),
        ("masks and dropout", {"attention_mask": torch.ones(1)}),
        ("needs a layout", {}),
    ],
)
def test_what_attention_does_not_implement_it_refuses(what: str, options: dict[str, Any]) -> None:
    query = torch.zeros(1, 2, 3, 4)
    mask = options.pop("attention_mask", None)
    with pytest.raises(ValueError, match=what):
        packed_attention(torch.nn.Module(), query, query, query, mask, **options)


def test_an_unknown_family_is_refused_by_name() -> None:
    class Config:
        model_type = "bert"

    with pytest.raises(ModelError, match="'bert' is not supported; supported are gemma, ") as refused:
        family_of(Config())
    assert refused.value.code == "unsupported_model"
