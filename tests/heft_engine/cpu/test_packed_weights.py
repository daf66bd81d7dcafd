"""Packed weights: a product's bits, while the weight is what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from needs import LOAD_AMX, needs_amx, needs_compiler
from torch import nn

from heft_engine.cpu import packed_weights
from heft_engine.cpu.packed_weights import bytes_to_pack, kept, kept_bytes, pack, packable, unpack
from heft_engine.data.encoding import Example
from heft_engine.evaluation import evaluate
from heft_engine.inference.scoring import score
from heft_engine.model.attention import IMPLEMENTATION
from heft_engine.model.base_models import load_model, resolve_path
from heft_engine.model.block_sizes import measured
from heft_engine.model.packed_lm import PackedLM
from heft_engine.serving.shared_copy import copy_sharing, unique_bytes

pytestmark = pytest.mark.usefixtures("without_amx")

needs_units = pytest.mark.skipif(
    not packable(torch.zeros(16, 16, dtype=torch.bfloat16)),
    reason="this processor has no bfloat16 products of packed weights",
)
CPU = torch.device("cpu")


def linear(outs: int, ins: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(ins, outs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    single = nn.Linear(8, 8)
    pack([single])
    assert kept(single.weight) is None
    assert bytes_to_pack([single]) == 0


@needs_amx
def test_what_is_packed_for_others_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(48, 64)
    for load in (LOAD_AMX, lambda: None):
        monkeypatch.setattr(packed_weights.operators, "amx_ops", load)
        pack([layer])
        assert kept(layer.weight) is not None
        assert kept(layer.weight).is_mkldnn == (load is not LOAD_AMX)  # type: ignore[union-attr]
        monkeypatch.setattr(
            packed_weights.operators, "amx_ops", LOAD_AMX if load is not LOAD_AMX else lambda: None
        )
        assert kept(layer.weight) is None


@needs_units
@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(320, 192), (192, 576), (576, 1_536)])
def test_a_packed_layer_gives_the_bits_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], bias: bool
) -> None:
    """In passes of every length, and with one thread as with several."""
    torch.manual_seed(1)
    layer, x = linear(*shape, bias=bias), torch.randn(2_100, shape[1]).bfloat16()
    first: torch.Tensor | None = None
    multiplied: list[bool] = []
    run = packed_weights.product

    def watched(*operands: torch.Tensor) -> torch.Tensor:
        multiplied.append(True)
        return run(*operands)

    monkeypatch.setattr(packed_weights, "product", watched)
    for is_packed in (False, True):
        if is_packed:
            pack([layer])
        for threads in (1, 3):
            torch.set_num_threads(threads)
            mode = measured([layer], CPU)[threads]
            if threads > 1 and not mode.is_alike:
                continue  # then rows alone go to a lane, too
            multiplied.clear()
            with mode:
                found = layer(x)
                for rows in (1, 32, 100, 700):
                    assert torch.equal(layer(x[50 : 50 + rows]), found[50 : 50 + rows])
            assert bool(multiplied) == (is_packed and bool(mode.packed))
            first = found if first is None else first
            assert torch.equal(found, first), (is_packed, threads)
    assert multiplied, "on no shape is a packed product taken"
    assert first is not None
    torch.testing.assert_close(first, layer(x), atol=2e-2, rtol=2e-2)


@needs_units
def test_a_weight_that_was_written_to_is_not_packed_any_more() -> None:
    layer = linear(32, 64)
    pack([layer])
    assert kept(layer.weight) is not None
    layer.weight.mul_(2)
    assert kept(layer.weight) is None
    pack([layer])
    assert kept(layer.weight) is not None
    unpack([layer])
    assert kept(layer.weight) is None


@needs_units
def test_packed_weights_are_counted_and_shared(make_tiny_model: Callable[[str], Path]) -> None:
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    plain, more = unique_bytes(lm.model), bytes_to_pack(lm.layers)
    assert more == sum(2 * m.weight.numel() for m in lm.layers.modules() if isinstance(m, nn.Linear))
    lm.pack(more - 1)
    assert bytes_to_pack(lm.layers) == more, "there was no room"
    lm.pack(more)
    assert bytes_to_pack(lm.layers) == 0
    assert unique_bytes(lm.model) == plain + more
    name = "model.layers.0.self_attn.q_proj"
    twin = PackedLM(copy_sharing(lm.model, {name}))
    own = twin.model.get_submodule(name).weight
    assert kept(own) is None
    assert bytes_to_pack(twin.layers) == 2 * own.numel(), "the others are packed already"
    twin.pack(1 << 20)
    assert unique_bytes(twin.model, beside=lm.model) == 2 * own.numel() + kept_bytes(own)


@needs_compiler
def test_a_copy_made_during_a_pass_runs_its_own_layers(make_tiny_model: Callable[[str], Path]) -> None:
    """Models are merged while the base answers."""
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    with lm.answering():
        assert "forward" in lm.layers[0].__dict__
        twin = copy_sharing(lm.model, {"model.layers.0.self_attn.q_proj"})
    assert not any("forward" in module.__dict__ for module in twin.modules())


@needs_units
def test_an_evaluation_packs_for_as_long_as_it_takes(
    make_tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = PackedLM(
        load_model(resolve_path(make_tiny_model("llama")), dtype=torch.bfloat16, attention=IMPLEMENTATION)
    )
    rows = [
        Example(prompt=(5, 9, 11) * 9, answers=((7,), (8,)), labels=("a", "b"), gold=0)
    ] * evaluate.WORTH_PACKING
    before = score(lm, rows)
    held: list[bool] = []
    run = packed_weights.product

    def watched(*operands: torch.Tensor) -> torch.Tensor:
        held.append(True)
        return run(*operands)

    monkeypatch.setattr(packed_weights, "product", watched)

    class Encoder:
        class task:
            type = "yes_no"

    found = evaluate.evaluate(lm, Encoder, rows, max_new_tokens=1)  # type: ignore[arg-type]
    assert held
    assert list(found.scores) == before
    assert bytes_to_pack(lm.layers) > 0
