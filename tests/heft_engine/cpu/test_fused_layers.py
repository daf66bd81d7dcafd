"""Layers for passes that only answer: the bits of the modules' own, with what hangs on them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_compiler
from probe_models import with_intervention
from torch import Tensor, nn

from heft_engine.cpu import fused_layers
from heft_engine.cpu.fused_layers import FusedLayers
from heft_engine.data.encoding import Example
from heft_engine.inference.scoring import score
from heft_engine.model import attention
from heft_engine.model.packed_lm import PackedLM
from heft_engine.model.packing import TILE, Tiles, pack

pytestmark = pytest.mark.usefixtures("with_and_without_amx")

QUICK = ("llama", "mistral", "qwen2", "qwen3")
OTHERS = ("gemma", "gemma2", "gemma3_text", "gpt_neox")
MakeModel = Callable[[str], Path]


def model(path: Path, dtype: torch.dtype = torch.bfloat16) -> PackedLM:
    return with_intervention(path, "l2", dtype)


def rows(count: int, *, branched: bool) -> list[Example]:
    chance = random.Random(1)
    found = []
    for index in range(count):
        prompt = tuple(chance.randrange(5, 600) for _ in range(chance.randint(1, 90)))
        choices = ((7,), (8,)) if index % 3 or not branched else ((7, 9, 11), (8, 12))
        found.append(Example(prompt=prompt, answers=choices, labels=("a", "b"), gold=0))
    return found


def totals(lm: PackedLM, examples: list[Example]) -> list[tuple[float, ...]]:
    return [one.totals for one in score(lm, examples)]


@needs_compiler
@pytest.mark.parametrize("family", QUICK + OTHERS)
@pytest.mark.parametrize("branched", [False, True])
def test_scores_have_the_bits_of_the_modules_own(
    make_tiny_model: MakeModel, family: str, branched: bool
) -> None:
    examples = rows(12, branched=branched)
    quick, plain = model(make_tiny_model(family)), model(make_tiny_model(family))
    plain._fused_layers = FusedLayers([], [], lambda *_: pytest.fail("nothing to turn"))
    assert totals(quick, examples) == totals(plain, examples)
    assert quick._fused_layers is not None
    assert len(quick._fused_layers) == (quick.n_layers if family in QUICK else 0)


@needs_compiler
def test_only_bfloat16_layers_are_quick(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"), torch.float32)
    totals(lm, rows(2, branched=False))
    assert lm._fused_layers is not None
    assert len(lm._fused_layers) == 0


@needs_compiler
def test_a_layer_that_is_not_what_it_looks_like_keeps_its_own_pass(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model(make_tiny_model("llama"))
    first: Any = lm.layers[0]
    own = type(first).forward

    def other(self: Any, states: Tensor, **options: Any) -> Tensor:
        return own(self, states, **options) * 2

    monkeypatch.setattr(type(first), "forward", other)
    expected = totals(lm, rows(3, branched=False))
    assert lm._fused_layers is not None
    assert len(lm._fused_layers) == 0
    assert totals(lm, rows(3, branched=False)) == expected


@needs_compiler
def test_hooks_on_layers_and_on_products_act(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"))
    examples = rows(3, branched=False)
    before = totals(lm, examples)
    seen: list[str] = []
    layer: Any = lm.layers[2]
    modules = {
        "layer": layer,
        "query": layer.self_attn.q_proj,
        "out": layer.self_attn.o_proj,
        "down": layer.mlp.down_proj,
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    doubled = layer.mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)
    assert totals(lm, examples) != before
    assert lm._fused_layers is not None
    assert len(lm._fused_layers) == lm.n_layers
    assert set(seen) == set(modules)
    doubled.remove()
    assert totals(lm, examples) == before


@needs_compiler
def test_layers_are_their_own_again_when_the_last_thread_has_left(make_tiny_model: MakeModel) -> None:
    lm = model(make_tiny_model("llama"))
    with lm.inference_mode():
        assert "forward" in lm.layers[0].__dict__
        ended = threading.Event()

        def other() -> None:
            with lm.inference_mode():
                ended.set()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ended.is_set()
        assert "forward" in lm.layers[0].__dict__
    assert "forward" not in lm.layers[0].__dict__


@needs_compiler
def test_a_family_asks_once_for_each_kind_of_layer(
    make_tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qwen2's windows act on some layers: what one asks for must not be taken for all."""
    asked: list[str] = []
    options = fused_layers._options

    def watched(layer: nn.Module, kind: str, *rest: Any) -> Any:
        asked.append(kind)
        return options(layer, kind, *rest)

    monkeypatch.setattr(fused_layers, "_options", watched)
    with model(make_tiny_model("qwen2")).inference_mode():
        assert sorted(asked) == ["full_attention", "sliding_attention"]


# -- rows filled up for attention


def test_tiles_hold_every_token_once() -> None:
    lengths = [3, TILE, TILE + 1, 5, 2 * TILE]
    tiles = Tiles.of(lengths)
    assert tiles.groups == ((0, 3, TILE), (3 * TILE, 2, 2 * TILE))
    assert tiles.starts == (0, TILE, 3 * TILE, 2 * TILE, 5 * TILE)
    together = sorted(torch.cat([tiles.places, tiles.gaps]).tolist())
    assert together == list(range(7 * TILE))
    first = 0
    for start, length in zip(tiles.starts, lengths, strict=True):
        assert tiles.places[first : first + length].tolist() == list(range(start, start + length))
        first += length


def test_a_layout_without_plain_rows_has_no_tiles() -> None:
    plain = pack(rows(4, branched=False)).layout
    assert plain.tiles is not None
    assert pack(rows(4, branched=True)).layout.tiles is None
    assert replace(plain, cached_prefixes=(None,) * 4).tiles is None


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_of_filled_rows_is_attention(window: int | None, softcap: float | None) -> None:
    """Against every row alone in float64, and with the bits of a pass that can't take them at once."""
    torch.manual_seed(2)
    layout = pack(rows(7, branched=False)).layout
    tokens = sum(row.length for row in layout.rows)
    q, k, v = (torch.randn(1, heads, tokens, 8).bfloat16() for heads in (4, 2, 2))
    module = nn.Module()
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    tiled, _ = attention.packed_attention(module, q, k, v, None, layout=layout, **options)  # type: ignore[arg-type]
    apart = replace(layout, cached_prefixes=(None,) * len(layout.rows))
    one_by_one, _ = attention.packed_attention(module, q, k, v, None, layout=apart, **options)  # type: ignore[arg-type]
    assert torch.equal(tiled, one_by_one)
    for row in layout.rows:
        own = slice(row.start, row.start + row.length)
        a, b, c = (each[0, :, own].double() for each in (q, k, v))
        scores = a @ b.repeat_interleave(2, 0).transpose(1, 2) * 0.3
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(row.length)[:, None] - torch.arange(row.length)
        hidden = (distance < 0) | (distance >= (window or 10_000))
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        expected = (weights @ c.repeat_interleave(2, 0)).transpose(0, 1)
        torch.testing.assert_close(tiled[0, own].double(), expected, atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_a_row_that_is_no_number_leaves_its_neighbours_alone() -> None:
    """They may be another customer's."""
    torch.manual_seed(2)
    layout = pack(rows(5, branched=False)).layout
    tokens = sum(row.length for row in layout.rows)
    q, k, v = (torch.randn(1, heads, tokens, 8).bfloat16() for heads in (4, 2, 2))
    before, _ = attention.packed_attention(nn.Module(), q, k, v, None, layout=layout)
    broken = layout.rows[2]
    own = slice(broken.start, broken.start + broken.length)
    for each in (q, k, v):
        each[:, :, own] = float("nan")
    after, _ = attention.packed_attention(nn.Module(), q, k, v, None, layout=layout)
    assert after[:, own].isnan().all()
    after[:, own] = before[:, own]
    assert torch.equal(after, before)
