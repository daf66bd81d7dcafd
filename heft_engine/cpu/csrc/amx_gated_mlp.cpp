// A gated MLP with its norm and residual on AMX: heft::amx_gated_mlp. A chunk of rows at a time, whose activations stay in
// the cache.

#include "amx_tiles.h"

#ifdef HEFT_AMX

#include "amx_args.h"

namespace heft {

namespace {

// Panel `index` of active = SiLU(gate(x)) · up(x), each step rounded: one panel of each weight side by side.
void gated_panel(
    const Activations& x, const Linear& gate, const Linear& up, long index, ChunkLora<kLora>& gate_lora,
    ChunkLora<kUpLora>& up_lora, const Activations& active) {
  const long column = index * kTile;
  gate_lora.load_panels(column, gate.out, false);
  up_lora.load_panels(column, gate.out, false);
  const auto add_lora = [&](long row, const Sums& sums) {
    gate_lora.accumulate<true, false>(row, sums);
    up_lora.accumulate<false, true>(row, sums);
  };
  const auto activate = [=](long row, __m512 low, __m512 high) {
    const Floats gated = round_to_bf16((Floats)silu_of_bf16((__m512)round_sum(low))) * round_sum(high);
    _mm256_store_si256((__m256i*)active.at(row, column), (__m256i)_mm512_cvtneps_pbh((__m512)gated));
  };
  panel_pair_product(
      x, {gate.panel(index, 0), up.panel(index, 1)}, {gate.ahead(index + 1), up.ahead(index + 1)}, add_lora, activate);
}

// out = down(SiLU(gate(y)) · up(y)) + x with y = norm(x). Every product, SiLU, · and + is rounded.
void run_gated_mlp(
    const bf16* x, const bf16* norm, float epsilon, const AdaptedLinear& gate, const AdaptedLinear& up,
    const AdaptedLinear& down, bf16* out, long rows) {
  const long width = gate.in, inner = gate.out, chunk = rows_per_chunk(std::max(width, inner));
  const Activations normed = scratch_activations<kRows>(std::min(rows, chunk), width);
  const Activations active = scratch_activations<kActive>(std::min(rows, chunk), inner);
#pragma omp parallel
  {
    TileScope tiles;
    for (long first = 0; first < rows; first += chunk) {
      const Activations part = normed.slice(0, std::min(chunk, rows - first));
      to_tiles(x + first * width, norm, epsilon, part);
      ChunkLora<kLora> gate_lora(gate.deltas, part, first);
      ChunkLora<kUpLora> up_lora(up.deltas, part, first);
#pragma omp for
      for (long panel = 0; panel < gate.panels(); panel++)
        gated_panel(part, gate, up, panel, gate_lora, up_lora, active);
      const Activations activated = active.slice(0, part.rows);
      ChunkLora<kLora> down_lora(down.deltas, activated, first);
#pragma omp for
      for (long pair = 0; pair < down.panel_pairs(); pair++)
        linear_panels(activated, down, x + first * width, out + first * width, pair, down_lora);
    }
  }
}

Tensor amx_gated_mlp(
    const Tensor& input, const Tensor& norm_weight, double epsilon, const Tensor& gate, const Tensor& up,
    const Tensor& down, bool is_packed, const Tensors& lora_down, const Tensors& lora_up, const Integers64& lora_linear,
    const Integers64& lora_start, const Integers64& lora_tokens, const Integers64& lora_index) {
  const Tensor x = contiguous_rows(input);
  const int64_t width = x.size(-1), inner = gate.dim() ? gate.size(0) : 0, rows = x.numel() / width;
  check(norm_weight, {width}, "norm_weight");
  check(up, {inner, width}, "up");
  check(down, {width, inner}, "down");
  std::vector<AdaptedLinear> linears{
      linear_of(gate, is_packed, width), linear_of(up, is_packed, width), linear_of(down, is_packed, inner)};
  add_deltas(linears, rows, lora_down, lora_up, lora_linear, lora_start, lora_tokens, lora_index);
  Tensor out = torch::stable::empty_like(x);
  run_gated_mlp(
      data(x), data(norm_weight), float(epsilon), linears[0], linears[1], linears[2], output(out), rows);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HEFT_NAMESPACE, m) {
  m.def(
      "amx_gated_mlp(Tensor x, Tensor norm_weight, float epsilon, Tensor gate, Tensor up, Tensor down, "
      "bool is_packed, " HEFT_LORA_SCHEMA ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CPU, m) { m.impl("amx_gated_mlp", TORCH_BOX(&amx_gated_mlp)); }

}  // namespace heft

#endif
