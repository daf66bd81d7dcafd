"""AMX operators: torch's bits, one order of sums whatever stands beside a row, or none at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ctypes_signatures import assert_types_are_declared
from needs import needs_amx
from torch import Tensor

from heft_engine.cpu import build, operators
from heft_engine.cpu.amx import AmxOps, LoraDelta, Norm, Projection, Segments
from heft_engine.cpu.fused_ops import rms_norm
from heft_engine.runtime.devices import cpp_compiler
from heft_engine.runtime.threads import openmp_runtime, torch_threads

#: More than one chunk of rows, and blocks of 32 with every kind of rest.
ROWS = (1, 15, 16, 17, 32, 33, 95, 257, 550)


@pytest.fixture
def amx_ops() -> AmxOps:
    found = operators.amx_ops()
    assert found is not None
    torch.manual_seed(5)
    return found


@pytest.fixture
def _afresh() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    for each in (operators.amx_ops, operators.fused_ops, build.library):
        each.cache_clear()


def some(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product by torch, in blocks of 32 rows."""
    rows = F.pad(x, (0, 0, 0, -len(x) % 32))
    return torch.cat([F.linear(part, weight, bias) for part in torch.split(rows, 32)])[: len(x)]


@needs_amx
@torch.inference_mode()
@pytest.mark.parametrize("shape", [(48, 32), (192, 576), (576, 1_536), (80, 1_184), (256, 4_096)])
def test_products_have_torchs_bits_in_passes_of_every_length(amx_ops: AmxOps, shape: tuple[int, int]) -> None:
    weight, bias = some(*shape), some(shape[0])
    packed = amx_ops.pack(weight)
    x, residual = some(max(ROWS), shape[1]), some(max(ROWS), shape[0])
    product, with_bias = exact(x, weight), exact(x, weight, bias)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for chosen in (None, packed):
                part = slice(max(ROWS) - rows, None)
                assert torch.equal(amx_ops.linear(x[part], weight, chosen), product[part])
                assert torch.equal(amx_ops.linear(x[part], weight, chosen, bias), with_bias[part])
                summed = amx_ops.linear(x[part], weight, chosen, None, residual[part])
                assert torch.equal(summed, product[part] + residual[part])
                both = amx_ops.linear(x[part], weight, chosen, bias, residual[part])
                assert torch.equal(both, with_bias[part] + residual[part])


@needs_amx
@torch.inference_mode()
@pytest.mark.parametrize(("width", "inner"), [(64, 160), (96, 1_536)])
def test_half_a_layer_has_the_bits_of_its_operations(amx_ops: AmxOps, width: int, inner: int) -> None:
    gate, up, down, norm = some(inner, width), some(inner, width), some(width, inner), Norm(some(width), 1e-6)
    states = some(max(ROWS), width)
    normed = rms_norm(states, *norm)
    with torch_threads(1):  # several threads leave torch rests, which it rounds otherwise
        expected = exact(F.silu(exact(normed, gate)) * exact(normed, up), down) + states
    packed = (amx_ops.pack(gate), amx_ops.pack(up), amx_ops.pack(down))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for chosen in (None, packed):
                found = amx_ops.gated_mlp(states[:rows], norm, (gate, up, down), chosen)
                assert torch.equal(found, expected[:rows]), (threads, rows)
            bias = some(inner)
            asked = [Projection(up, None, bias), Projection(gate, packed[0])]
            first, second = amx_ops.norm_linears(states[:rows], norm, asked)
            assert torch.equal(first, exact(normed, up, bias)[:rows])
            assert torch.equal(second, exact(normed, gate)[:rows])


def masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """In float32."""
    q, k, v = (each.float().transpose(0, 1) for each in (query, keys, values))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
    return found.transpose(0, 1)


@needs_amx
@torch.inference_mode()
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 32), (2, 1, 96), (2, 2, 256)])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_attention_is_its_formula_and_a_querys_own(
    amx_ops: AmxOps, heads: int, kv_heads: int, width: int, window: int | None
) -> None:
    """Sequences beside others, behind a kept prefix, with branches, and with several threads."""
    lengths = (1, 16, 33, 90, 300)
    tokens = sum(lengths)
    query, keys, values = (
        some(tokens, heads, width),
        some(tokens, kv_heads, width),
        some(tokens, kv_heads, width),
    )
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    table = Segments([(s, n, [(0, s, n)]) for s, n in zip(starts, lengths, strict=True)])
    first: Tensor | None = None
    for threads in (1, 3):
        torch.set_num_threads(threads)
        together = amx_ops.attention(query, [(keys, values)], table, 0.2, window)
        first = together if first is None else first
        assert torch.equal(together, first)
        for start, length in zip(starts, lengths, strict=True):
            own = slice(start, start + length)
            q, k, v = query[own], keys[own], values[own]
            distance = torch.arange(length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance < (window or length))
            close = masked(q, k, v, seen, 0.2)
            torch.testing.assert_close(together[own].float(), close, atol=2e-2, rtol=1e-2)
            alone = Segments([(0, length, [(0, 0, length)])])
            assert torch.equal(amx_ops.attention(q, [(k, v)], alone, 0.2, window), together[own])
            for left in {1, length // 3, length - 1} - {0, length}:
                # Kept as a prefix cache has them: heads first.
                kept = tuple(each[:left].transpose(0, 1).contiguous().transpose(0, 1) for each in (k, v))
                behind = Segments([(0, length - left, [(1, 0, left), (0, 0, length - left)])])
                found = amx_ops.attention(
                    q[left:], [(k[left:], v[left:]), (kept[0], kept[1])], behind, 0.2, window
                )
                assert torch.equal(found, together[own][left:]), (length, left)


@needs_amx
@torch.inference_mode()
def test_what_is_no_number_stays_in_its_sequence(amx_ops: AmxOps) -> None:
    query, keys, values = some(80, 2, 32), some(80, 2, 32), some(80, 2, 32)
    table = Segments([(0, 40, [(0, 0, 40)]), (40, 40, [(0, 40, 40)])])
    before = amx_ops.attention(query, [(keys, values)], table, None, None)
    for each in (query, keys, values):
        each[40:] = float("nan")
    after = amx_ops.attention(query, [(keys, values)], table, None, None)
    assert torch.equal(after[:40], before[:40])
    assert after[40:].isnan().all()


@needs_amx
@torch.inference_mode()
@pytest.mark.parametrize("ins", [64, 640])
def test_additions_are_those_of_their_rows_alone(amx_ops: AmxOps, ins: int) -> None:
    """Of many models in one pass, at borders of blocks and of chunks, of several ranks, two for the same rows."""
    outs, inner = 96, 160
    factors = {rank: (some(3, rank, ins), some(3, rank, outs)) for rank in (1, 8, 16, 17, 40)}
    spans = [(0, 5, 8), (5, 60, 17), (65, 1, 1), (240, 40, 40), (240, 40, 16), (500, 50, 8)]
    lora_deltas = [LoraDelta(start, count, *factors[rank], 2) for start, count, rank in spans]
    x, weight, residual = some(550, ins), some(outs, ins), some(550, outs)
    norm = Norm(some(ins), 1e-5)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        together = amx_ops.linear(x, weight, None, None, residual, lora_deltas)
        (projected,) = amx_ops.norm_linears(x, norm, [Projection(weight, lora_deltas=lora_deltas)])
        touched = torch.zeros(550, dtype=torch.bool)
        for start, count in {(start, count) for start, count, _ in spans}:
            own = slice(start, start + count)
            touched[own] = True
            moved = [a._replace(start=7) for a in lora_deltas if (a.start, a.tokens) == (start, count)]
            alone = torch.cat([some(7, ins), x[own]])
            beside = torch.cat([some(7, outs), residual[own]])
            assert torch.equal(amx_ops.linear(alone, weight, None, None, beside, moved)[7:], together[own])
            (again,) = amx_ops.norm_linears(alone, norm, [Projection(weight, lora_deltas=moved)])
            assert torch.equal(again[7:], projected[own])
            low = [
                ((x[own].float() @ a.down[2].float().T).bfloat16().float(), a.up[2].float()) for a in moved
            ]
            close = x[own].float() @ weight.float().T + sum(each @ up for each, up in low)
            torch.testing.assert_close(together[own] - residual[own], close.bfloat16(), atol=0.5, rtol=2e-2)
        assert torch.equal(together[~touched], (exact(x, weight) + residual)[~touched])
        assert torch.equal(
            amx_ops.linear(x, weight, amx_ops.pack(weight), None, residual, lora_deltas), together
        )
        (with_bias,) = amx_ops.norm_linears(x, norm, [Projection(weight, None, some(outs), lora_deltas)])
        assert not torch.equal(with_bias, projected)
    gate, up, down = some(inner, ins), some(inner, ins), some(ins, inner)
    to_inner = [
        LoraDelta(start, count, some(1, 8, ins), some(1, 8, inner), 0) for start, count, _ in spans[:4]
    ]
    to_width = [
        LoraDelta(start, count, some(1, 8, inner), some(1, 8, ins), 0) for start, count, _ in spans[:4]
    ]
    added = (to_inner, to_inner[::-1], to_width)
    whole = amx_ops.gated_mlp(x, norm, (gate, up, down), None, added)
    hidden = rms_norm(x, *norm)
    active = operators.fused_ops().gate_silu(  # type: ignore[union-attr]
        amx_ops.linear(hidden, gate, lora_deltas=added[0]), amx_ops.linear(hidden, up, lora_deltas=added[1])
    )
    assert torch.equal(whole, amx_ops.linear(active, down, None, None, x, added[2]))


@needs_amx
@torch.inference_mode()
def test_what_is_no_number_comes_out_of_a_gate_as_none(amx_ops: AmxOps) -> None:
    """Otherwise a broken model would answer, and otherwise than beside rows that keep its layers apart."""
    gate, up, down, norm = some(64, 32), some(64, 32), some(32, 64), Norm(some(32), 1e-5)
    for broken in (float("nan"), -3e38, 3e38):
        gate[7] = broken
        states = some(40, 32)
        hidden = rms_norm(states, *norm)
        active = operators.fused_ops().gate_silu(amx_ops.linear(hidden, gate), amx_ops.linear(hidden, up))  # type: ignore[union-attr]
        expected = amx_ops.linear(active, down, None, None, states)
        found = amx_ops.gated_mlp(states, norm, (gate, up, down), None)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert not found.isfinite().all()


@needs_amx
@torch.inference_mode()
def test_huge_scores_are_numbers(amx_ops: AmxOps) -> None:
    query, keys, values = 1e5 * some(40, 2, 32), 1e5 * some(40, 1, 32), some(40, 1, 32)
    assert (
        amx_ops.attention(query, [(keys, values)], Segments([(0, 40, [(0, 0, 40)])]), None, None)
        .isfinite()
        .all()
    )


@needs_amx
@torch.inference_mode()
def test_a_broken_row_leaves_its_neighbours_alone(amx_ops: AmxOps) -> None:
    x, weight = some(70, 64), some(48, 64)
    lora_delta = LoraDelta(20, 30, some(1, 8, 64), some(1, 8, 48), 0)
    before = amx_ops.linear(x, weight, lora_deltas=[lora_delta])
    x[25] = float("nan")
    x[60] = float("inf")
    after = amx_ops.linear(x, weight, lora_deltas=[lora_delta])
    whole = torch.ones(70, dtype=torch.bool)
    whole[[25, 60]] = False
    assert torch.equal(after[whole], before[whole])
    assert after[25].isnan().all()


@needs_amx
def test_tensors_that_do_not_fit_are_refused(amx_ops: AmxOps) -> None:
    x, weight, norm = some(6, 64), some(48, 64), Norm(some(64), 1e-5)
    down = some(64, 48)
    q, k = some(6, 4, 32), some(6, 2, 32)
    whole = Segments([(0, 6, [(0, 0, 6)])])
    odd = torch.ops.mkldnn._reorder_linear_weight(weight) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
    wrong: list[Callable[[], object]] = [
        lambda: amx_ops.pack(some(50, 64)),
        lambda: amx_ops.linear(some(6, 32), weight),
        lambda: amx_ops.linear(x.float(), weight),
        lambda: amx_ops.linear(x, weight.float()),
        lambda: amx_ops.linear(x, some(64, 48).T),
        lambda: amx_ops.linear(x, weight, some(64, 48)),
        lambda: amx_ops.linear(x, weight, None, some(47)),
        lambda: amx_ops.linear(x, weight, None, some(48).float()),
        lambda: amx_ops.linear(x, weight, None, None, some(5, 48)),
        lambda: amx_ops.linear(x, weight, lora_deltas=[LoraDelta(3, 4, some(1, 8, 64), some(1, 8, 48), 0)]),
        lambda: amx_ops.linear(x, weight, lora_deltas=[LoraDelta(-1, 4, some(1, 8, 64), some(1, 8, 48), 0)]),
        lambda: amx_ops.linear(x, weight, lora_deltas=[LoraDelta(0, 4, some(1, 8, 64), some(1, 8, 48), 1)]),
        lambda: amx_ops.linear(x, weight, lora_deltas=[LoraDelta(0, 4, some(1, 8, 64), some(1, 7, 48), 0)]),
        lambda: amx_ops.linear(x, weight, lora_deltas=[LoraDelta(0, 4, some(1, 8, 48), some(1, 8, 48), 0)]),
        lambda: amx_ops.norm_linears(x, Norm(some(63), 1e-5), [Projection(weight)]),
        lambda: amx_ops.norm_linears(x, norm, [Projection(some(48, 32))]),
        lambda: amx_ops.norm_linears(x, norm, [Projection(weight, None, some(40))]),
        lambda: amx_ops.gated_mlp(x, norm, (weight, some(64, 64), down), None),
        lambda: amx_ops.gated_mlp(x, norm, (weight, weight, some(48, 64)), None),
        lambda: amx_ops.gated_mlp(x, norm, (weight, weight, down), (weight, weight, weight)),
        lambda: amx_ops.attention(q, [(k[:5], k[:5])], whole, None, None),
        lambda: amx_ops.attention(q[:5], [(k, k)], whole, None, None),
        lambda: amx_ops.attention(q, [(k, k.float())], whole, None, None),
        lambda: amx_ops.attention(q, [(some(6, 3, 32), some(6, 3, 32))], whole, None, None),
        lambda: amx_ops.attention(some(6, 4, 16), [(some(6, 2, 16), some(6, 2, 16))], whole, None, None),
        lambda: amx_ops.attention(q, [(k, k)], Segments([(0, 6, [(1, 0, 6)])]), None, None),
        lambda: amx_ops.attention(q, [(k, k)], whole, None, -1),
        lambda: amx_ops.attention(q, [], whole, None, None),
        lambda: amx_ops.attention(q, [(k[:, :0], k[:, :0])], whole, None, None),
        lambda: amx_ops.attention(
            q, [(k.transpose(1, 2).contiguous().transpose(1, 2), k)], whole, None, None
        ),
    ]
    if odd is not None:
        wrong.append(lambda: amx_ops.linear(x, weight, odd))
    for call in wrong:
        with pytest.raises(ValueError, match="fit together"):
            call()
    with pytest.raises(ValueError, match="more queries than tokens"):
        Segments([(0, 6, [(0, 0, 5)])])
    for begins in ((-1, 6, [(0, 0, 6)]), (0, 6, [(0, -3, 9)]), (0, 6, [(-1, 0, 6)])):
        with pytest.raises(ValueError, match="begins before"):
            Segments([begins])


@needs_amx
@pytest.mark.usefixtures("_afresh")
@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("_tile_dpbf16ps(3, 5, 7);\n    meanwhile", "_tile_dpbf16ps(3, 5, 6);\n    meanwhile", "a product"),
        ("low = _mm512_add_ps(low, low_bias)", "low = low", "a product with a bias"),
        ("(rounded_sum(low) + load(from))", "((Floats)low + load(from))", "a product and a sum"),
        ("normalise(x + row * width, weight,", "normalise(x, weight,", "a product of normed states"),
        ("* rounded_sum(high);", "* (Floats)high;", "a gated activation"),
        ("_mm512_set1_ps(127.9f)", "_mm512_set1_ps(127.5f)", "SiLU"),
        ("row + own.base >= own.begin &&", "", "a LoRA delta"),
        (
            "const long last = position + r + 1 - begin;",
            "const long last = position + r - begin;",
            "attention",
        ),
    ],
)
def test_there_are_none_that_give_something_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    right: str,
    wrong: str,
    named: str,
) -> None:
    text = build.SOURCES[1].read_text()
    assert right in text
    source = tmp_path / "matrix_units.cpp"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "SOURCES", (source,))
    with caplog.at_level(logging.INFO):
        assert operators.amx_ops(tmp_path) is None
    assert f"{named} gives other bits" in caplog.text


def test_they_are_there_on_a_processor_that_has_them() -> None:
    """What is skipped without them must not be skipped with them."""
    has = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    if has and cpp_compiler() is not None and openmp_runtime() is not None:
        assert operators.amx_ops() is not None
    else:
        assert operators.amx_ops() is None


@needs_amx
@pytest.mark.usefixtures("_afresh")
def test_kernels_do_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "matrix_units.cpp"
    source.write_text("this is no C++")
    monkeypatch.setattr(build, "SOURCES", (build.SOURCES[0], source))
    assert operators.amx_ops(tmp_path) is None
    assert operators.fused_ops(tmp_path) is not None


@pytest.mark.usefixtures("_afresh")
def test_there_are_none_where_the_system_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def heft_units_ready(self) -> int:
            return 0

    monkeypatch.setattr(build, "library", lambda cache_dir: Library())
    assert operators.amx_ops(tmp_path) is None


@pytest.mark.usefixtures("_afresh")
def test_an_operator_turns_them_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEFT_KERNELS", "off")
    assert operators.amx_ops(tmp_path) is None


def test_types_are_those_of_the_source() -> None:
    assert_types_are_declared(build.SOURCES[1].read_text(), AmxOps, "heft_units_")
