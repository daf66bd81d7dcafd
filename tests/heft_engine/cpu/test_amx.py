"""AMX operators against Intel's formula: sums have one order whatever stands beside a row; on AMX, torch's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heft_engine.cpu import operators
from heft_engine.cpu.amx import AmxOps, LoraDelta, Norm, Projection, Segments
from heft_engine.cpu.fused_ops import rms_norm
from heft_engine.cpu.selftest import torch_product
from heft_engine.runtime.threads import torch_threads

#: More than one chunk of rows, and blocks of 32 with every kind of remainder.
ROWS = (1, 15, 16, 17, 32, 33, 95, 257, 290)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def tile_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product as tiles sum it: even and odd products of 32 inputs apart, by fused multiply-adds in float32.

    Float64 holds such a sum exactly or far enough from a tie: rounding it to float32 is a fused multiply-add.
    """
    total = torch.zeros(len(x), len(weight))
    products = x.double()[:, None] * weight.double()
    for tile in products.split(32, dim=-1):
        even, odd = torch.zeros_like(total), torch.zeros_like(total)
        for pair in tile.split(2, dim=-1):
            even, odd = (even.double() + pair[..., 0]).float(), (odd.double() + pair[..., 1]).float()
        total += even + odd
    return (total if bias is None else total + bias).bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(48, 32), (96, 576), (80, 1_184), (16, 4_096)])
def test_products_are_the_formula_in_passes_of_every_length(amx_ops: AmxOps, shape: tuple[int, int]) -> None:
    weight, bias = draw(*shape), draw(shape[0])
    packed = amx_ops.pack(weight)
    x, residual = draw(max(ROWS), shape[1]), draw(max(ROWS), shape[0])
    # The longest pass's last rows are those of the others.
    plain, with_bias = tile_product(x[-95:], weight), tile_product(x[-95:], weight, bias)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            tail, compared = slice(max(ROWS) - rows, None), slice(-min(rows, 95), None)
            for copy in (None, packed):
                results = [
                    (amx_ops.linear(x[tail], weight, copy), plain),
                    (amx_ops.linear(x[tail], weight, copy, bias), with_bias),
                    (amx_ops.linear(x[tail], weight, copy, None, residual[tail]), plain + residual[-95:]),
                    (amx_ops.linear(x[tail], weight, copy, bias, residual[tail]), with_bias + residual[-95:]),
                ]
                assert all(torch.equal(result[compared], exact[compared]) for result, exact in results)


@torch.inference_mode()
def test_products_have_torchs_bits_on_amx() -> None:
    amx_ops = operators.amx_ops()
    if amx_ops is None:
        pytest.skip("this processor has no AMX: torch sums in another order")
    x, weight, bias = draw(550, 1_184), draw(80, 1_184), draw(80)
    assert torch.equal(amx_ops.linear(x, weight, None, bias), torch_product(x, weight, bias))


@torch.inference_mode()
@pytest.mark.parametrize(("width", "inner"), [(64, 160), (96, 1_536)])
def test_half_a_layer_has_the_bits_of_its_operations(amx_ops: AmxOps, width: int, inner: int) -> None:
    gate, up, down, norm = draw(inner, width), draw(inner, width), draw(width, inner), Norm(draw(width), 1e-6)
    states, bias = draw(max(ROWS), width), draw(inner)
    normed = rms_norm(states, *norm)
    active = activated(amx_ops.linear(normed, gate), amx_ops.linear(normed, up))
    expected = amx_ops.linear(active, down, None, None, states)
    with_bias, plain = amx_ops.linear(normed, up, None, bias), amx_ops.linear(normed, gate)
    packed = (amx_ops.pack(gate), amx_ops.pack(up), amx_ops.pack(down))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            for copies in (None, packed):
                result = amx_ops.gated_mlp(states[:rows], norm, (gate, up, down), copies)
                assert torch.equal(result, expected[:rows]), (threads, rows)
            projections = [Projection(up, None, bias), Projection(gate, packed[0])]
            first, second = amx_ops.norm_linears(states[:rows], norm, projections)
            assert torch.equal(first, with_bias[:rows])
            assert torch.equal(second, plain[:rows])


def activated(gate: Tensor, up: Tensor) -> Tensor:
    with torch_threads(1):  # torch rounds the remainders of several threads' shares differently
        return F.silu(gate) * up


def masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Masked attention by torch, in float32."""
    q, k, v = (tensor.float().transpose(0, 1) for tensor in (query, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(
        0, 1
    )


@torch.inference_mode()
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 32), (2, 1, 96), (2, 2, 256)])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_attention_is_the_formula_and_independent_of_company(
    amx_ops: AmxOps, heads: int, kv_heads: int, width: int, window: int | None
) -> None:
    """A sequence's bits are the same beside others, behind a cached prefix, and with several threads."""
    lengths = (1, 16, 33, 90, 170)
    tokens = sum(lengths)
    query, keys, values = (
        draw(tokens, heads, width),
        draw(tokens, kv_heads, width),
        draw(tokens, kv_heads, width),
    )
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    table = Segments([(s, n, [(0, s, n)]) for s, n in zip(starts, lengths, strict=True)])
    whole = amx_ops.attention(query, [(keys, values)], table, 0.2, window)
    torch.set_num_threads(3)
    assert torch.equal(amx_ops.attention(query, [(keys, values)], table, 0.2, window), whole)
    for start, length in zip(starts, lengths, strict=True):
        row = slice(start, start + length)
        q, k, v, expected = query[row], keys[row], values[row], whole[row]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        exact = masked(q, k, v, (distance >= 0) & (distance < (window or length)), 0.2)
        torch.testing.assert_close(expected.float(), exact, atol=2e-2, rtol=1e-2)
        alone = Segments([(0, length, [(0, 0, length)])])
        assert torch.equal(amx_ops.attention(q, [(k, v)], alone, 0.2, window), expected)
        for prefix in {1, length // 3, length - 1} - {0, length}:
            # In memory as a prefix cache has it: heads first.
            cached_k, cached_v = (x[:prefix].transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
            sources = [(k[prefix:], v[prefix:]), (cached_k, cached_v)]
            behind = Segments([(0, length - prefix, [(1, 0, prefix), (0, 0, length - prefix)])])
            rest = amx_ops.attention(q[prefix:], sources, behind, 0.2, window)
            assert torch.equal(rest, expected[prefix:]), (length, prefix)


@torch.inference_mode()
def test_a_nan_stays_in_its_sequence(amx_ops: AmxOps) -> None:
    query, keys, values = draw(80, 2, 32), draw(80, 2, 32), draw(80, 2, 32)
    table = Segments([(0, 40, [(0, 0, 40)]), (40, 40, [(0, 40, 40)])])
    before = amx_ops.attention(query, [(keys, values)], table, None, None)
    for x in (query, keys, values):
        x[40:] = float("nan")
    result = amx_ops.attention(query, [(keys, values)], table, None, None)
    assert torch.equal(result[:40], before[:40])
    assert result[40:].isnan().all()


#: First row, rows and rank of LoRA deltas: at borders of blocks and of chunks, two for the same rows.
SPANS = [(0, 5, 8), (5, 60, 17), (65, 1, 1), (240, 40, 40), (240, 40, 16), (280, 10, 8)]


@torch.inference_mode()
@pytest.mark.parametrize("ins", [64, 640])
def test_lora_deltas_are_those_of_their_rows_alone(amx_ops: AmxOps, ins: int) -> None:
    rows, outs = 290, 48
    factors = {rank: (draw(3, rank, ins), draw(3, rank, outs)) for _, _, rank in SPANS}
    deltas = [LoraDelta(start, tokens, *factors[rank], 2) for start, tokens, rank in SPANS]
    x, weight, residual, norm = draw(rows, ins), draw(outs, ins), draw(rows, outs), Norm(draw(ins), 1e-5)
    together = amx_ops.linear(x, weight, None, None, residual, deltas)
    assert torch.equal(amx_ops.linear(x, weight, amx_ops.pack(weight), None, residual, deltas), together)
    (projected,) = amx_ops.norm_linears(x, norm, [Projection(weight, lora_deltas=deltas)])
    torch.set_num_threads(3)
    is_plain = torch.ones(rows, dtype=torch.bool)
    for start, tokens in {(start, tokens) for start, tokens, _ in SPANS}:
        span = slice(start, start + tokens)
        is_plain[span] = False
        moved = [d._replace(start=7) for d in deltas if (d.start, d.tokens) == (start, tokens)]
        moved_x, moved_residual = (
            torch.cat([draw(7, ins), x[span]]),
            torch.cat([draw(7, outs), residual[span]]),
        )
        alone = amx_ops.linear(moved_x, weight, None, None, moved_residual, moved)
        assert torch.equal(alone[7:], together[span])
        (alone,) = amx_ops.norm_linears(moved_x, norm, [Projection(weight, lora_deltas=moved)])
        assert torch.equal(alone[7:], projected[span])
        single = x[span].float()
        exact = single @ weight.float().T
        for delta in moved:
            exact += (single @ delta.down[2].float().T).bfloat16().float() @ delta.up[2].float()
        torch.testing.assert_close(together[span] - residual[span], exact.bfloat16(), atol=0.5, rtol=2e-2)
    assert torch.equal(together[is_plain], amx_ops.linear(x, weight, None, None, residual)[is_plain])


@torch.inference_mode()
def test_each_linear_layer_has_its_own_lora_deltas(amx_ops: AmxOps) -> None:
    rows, width, inner = 290, 64, 160
    x, norm = draw(rows, width), Norm(draw(width), 1e-5)
    gate, up, down = weights = (draw(inner, width), draw(inner, width), draw(width, inner))
    to_inner, to_width = (
        [LoraDelta(start, tokens, draw(1, 8, ins), draw(1, 8, outs), 0) for start, tokens, _ in SPANS[:4]]
        for ins, outs in ((width, inner), (inner, width))
    )
    deltas = (to_inner, to_inner[::-1][1:], to_width)
    hidden = rms_norm(x, *norm)
    gates, ups = (amx_ops.linear(hidden, w, lora_deltas=d) for w, d in zip(weights[:2], deltas, strict=False))
    expected = amx_ops.linear(activated(gates, ups), down, None, None, x, deltas[2])
    assert torch.equal(amx_ops.gated_mlp(x, norm, (gate, up, down), None, deltas), expected)
    projections = [
        Projection(up, None, None, deltas[1]),
        Projection(gate),
        Projection(gate, None, None, to_inner),
    ]
    first, plain, last = amx_ops.norm_linears(x, norm, projections)
    assert torch.equal(first, ups)
    assert torch.equal(plain, amx_ops.linear(hidden, gate))
    assert torch.equal(last, gates)


@torch.inference_mode()
def test_nan_and_infinity_come_out_of_a_gate(amx_ops: AmxOps) -> None:
    """Otherwise a broken model would answer, and its answers would depend on the rows beside it."""
    gate, up, down, norm = draw(64, 32), draw(64, 32), draw(32, 64), Norm(draw(32), 1e-5)
    for broken in (float("nan"), -3e38, 3e38):
        gate[7] = broken
        states = draw(40, 32)
        hidden = rms_norm(states, *norm)
        active = activated(amx_ops.linear(hidden, gate), amx_ops.linear(hidden, up))
        expected = amx_ops.linear(active, down, None, None, states)
        result = amx_ops.gated_mlp(states, norm, (gate, up, down), None)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert not result.isfinite().all()


@torch.inference_mode()
def test_huge_scores_are_numbers(amx_ops: AmxOps) -> None:
    query, keys, values = 1e5 * draw(40, 2, 32), 1e5 * draw(40, 1, 32), draw(40, 1, 32)
    result = amx_ops.attention(query, [(keys, values)], Segments([(0, 40, [(0, 0, 40)])]), None, None)
    assert result.isfinite().all()


@torch.inference_mode()
def test_a_broken_row_leaves_its_neighbours_alone(amx_ops: AmxOps) -> None:
    x, weight = draw(70, 64), draw(48, 64)
    lora_delta = LoraDelta(20, 30, draw(1, 8, 64), draw(1, 8, 48), 0)
    before = amx_ops.linear(x, weight, lora_deltas=[lora_delta])
    x[25] = float("nan")
    x[60] = float("inf")
    result = amx_ops.linear(x, weight, lora_deltas=[lora_delta])
    whole = torch.ones(70, dtype=torch.bool)
    whole[[25, 60]] = False
    assert torch.equal(result[whole], before[whole])
    assert result[25].isnan().all()


def test_weights_that_do_not_fit_are_refused(amx_ops: AmxOps) -> None:
    """Kernels see only addresses, and would read and write past the tensors' ends."""
    x, weight, down, norm = draw(6, 64), draw(48, 64), draw(64, 48), Norm(draw(64), 1e-5)

    def with_delta(start: int, tokens: int, ins: int, outs: int, index: int) -> Tensor:
        delta = LoraDelta(start, tokens, draw(1, 8, ins), draw(1, 8, outs), index)
        return amx_ops.linear(x, weight, lora_deltas=[delta])

    wrong: list[tuple[str, Callable[[], object]]] = [
        ("32 · n inputs and 16 · n outputs", lambda: amx_ops.pack(draw(50, 64))),
        (r"\(48, 32\), not \(48, 64\)", lambda: amx_ops.linear(draw(6, 32), weight)),
        ("x must be .* BFloat16", lambda: amx_ops.linear(x.float(), weight)),
        ("weight must be BFloat16", lambda: amx_ops.linear(x, weight.float())),
        ("weight must be contiguous", lambda: amx_ops.linear(x, down.T)),
        ("weight must have the shape", lambda: amx_ops.linear(x, weight, down)),
        ("bias must have the shape", lambda: amx_ops.linear(x, weight, None, draw(47))),
        ("bias must be BFloat16", lambda: amx_ops.linear(x, weight, None, draw(48).float())),
        ("residual must have the shape", lambda: amx_ops.linear(x, weight, None, None, draw(5, 48))),
        ("within the rows of x", lambda: with_delta(3, 4, 64, 48, 0)),
        ("within the rows of x", lambda: with_delta(-1, 4, 64, 48, 0)),
        ("lora_index must be", lambda: with_delta(0, 4, 64, 48, 1)),
        ("lora_up must have the shape", lambda: with_delta(0, 4, 64, 47, 0)),
        ("lora_down must have the shape", lambda: with_delta(0, 4, 48, 48, 0)),
        ("norm_weight", lambda: amx_ops.norm_linears(x, Norm(draw(63), 1e-5), [Projection(weight)])),
        ("weight must have the shape", lambda: amx_ops.norm_linears(x, norm, [Projection(draw(48, 32))])),
        ("bias", lambda: amx_ops.norm_linears(x, norm, [Projection(weight, None, draw(40))])),
        ("one length", lambda: amx_ops.norm_linears(x, norm, [])),
        ("up must have the shape", lambda: amx_ops.gated_mlp(x, norm, (weight, draw(64, 64), down), None)),
        ("down must have the shape", lambda: amx_ops.gated_mlp(x, norm, (weight, weight, weight), None)),
        ("heft", lambda: amx_ops.linear(x.to("meta"), weight)),
    ]
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        packed_by_torch = torch.ops.mkldnn._reorder_linear_weight(weight)
        wrong.append(("heft", lambda: amx_ops.linear(x, weight, packed_by_torch)))
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_sequences_that_do_not_fit_are_refused(amx_ops: AmxOps) -> None:
    q, k = draw(6, 4, 32), draw(6, 2, 32)
    row = (0, 6, [(0, 0, 6)])

    def attend(
        segment: tuple[int, int, list[tuple[int, int, int]]] = row,
        query: Tensor = q,
        keys: Tensor = k,
        values: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        source = (keys, keys if values is None else values)
        return amx_ops.attention(query, [source], Segments([segment]), None, window)

    wrong: list[tuple[str, Callable[[], object]]] = [
        ("a piece must lie within its source", lambda: attend(keys=k[:5])),
        ("within the queries", lambda: attend(query=q[:5])),
        ("keys and values must be BFloat16", lambda: attend(values=k.float())),
        ("heads must be a multiple", lambda: attend(keys=draw(6, 3, 32))),
        ("a head must be", lambda: attend(query=draw(6, 4, 16), keys=draw(6, 2, 16))),
        ("must be contiguous", lambda: attend(keys=k.transpose(1, 2).contiguous().transpose(1, 2))),
        (r"must be \(tokens, 2, 32\)", lambda: attend(values=draw(6, 2, 64))),
        ("a piece is of no source", lambda: attend((0, 6, [(1, 0, 6)]))),
        ("a piece is of no source", lambda: attend((0, 6, [(-1, 0, 6)]))),
        ("a piece must lie within", lambda: attend((0, 6, [(0, -3, 9)]))),
        ("within the queries", lambda: attend((-1, 6, [(0, 0, 6)]))),
        ("more queries than tokens", lambda: attend((0, 6, [(0, 0, 5)]))),
        ("window must be positive", lambda: attend(window=-1)),
        ("query must be", lambda: amx_ops.attention(q, [], Segments([row]), None, None)),
        ("heads must be a multiple", lambda: attend(keys=k[:, :0])),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


@torch.inference_mode()
def test_a_pass_without_sequences_has_results_of_its_shape(amx_ops: AmxOps) -> None:
    query, keys = draw(3, 4, 32), draw(3, 2, 32)
    assert amx_ops.attention(query, [(keys, keys)], Segments([(0, 0, [])]), None, None).shape == query.shape
