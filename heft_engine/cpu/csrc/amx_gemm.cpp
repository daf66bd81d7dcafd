// Linear layers on AMX: heft::amx_enable, amx_pack, amx_linears.

#include "amx_tiles.h"

#ifdef HEFT_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include "amx_args.h"

namespace heft {

namespace {

// outs[i] = linears[i](y), rounded, + residuals[i], rounded, with y = norm(x), or x without a norm.
void run_linears(
    const bf16* x, const bf16* norm, float epsilon, const std::vector<AdaptedLinear>& linears,
    const std::vector<const bf16*>& residuals, const std::vector<bf16*>& outs, long rows) {
  const long in = linears.front().in, chunk = rows_per_chunk(in);
  long columns = 0;
  for (const Linear& linear : linears) columns += linear.out;
  const Activations room = scratch_activations<kRows>(std::min(rows, chunk), in);
#pragma omp parallel if (in * columns > 65536)
  {
    TileScope tiles;
    for (long first = 0; first < rows; first += chunk) {
      const Activations part = room.slice(0, std::min(chunk, rows - first));
      to_tiles(x + first * in, norm, epsilon, part);
      for (size_t i = 0; i < linears.size(); i++) {
        const AdaptedLinear& linear = linears[i];
        ChunkLora<kLora> lora(linear.deltas, part, first);
        const long offset = first * linear.out;
        const bf16* residual = residuals[i] ? residuals[i] + offset : nullptr;
#pragma omp for nowait
        for (long pair = 0; pair < linear.panel_pairs(); pair++)
          linear_panels(part, linear, residual, outs[i] + offset, pair, lora);
      }
#pragma omp barrier
    }
  }
}

// Asks Linux for the tile registers (Documentation/arch/x86/xstate.rst); true if this process may use them.
bool amx_enable() {
#ifdef HEFT_EMULATE_AMX
  return true;
#else
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

// A weight (out, in) as [out / 16][in / 32] tiles.
Tensor amx_pack(const Tensor& weight) {
  const Linear linear = linear_of(weight, false, weight.dim() ? weight.size(-1) : 0);
  Tensor out = torch::stable::empty_like(weight);
  bf16* packed = output(out);
#pragma omp parallel for
  for (long panel = 0; panel < linear.panels(); panel++) {
    const long offset = panel * kTile * linear.in;
    pack_panel(linear.weight + offset, packed + offset, linear.in);
  }
  return out;
}

Tensors amx_linears(
    const Tensor& input, const std::optional<Tensor>& norm_weight, double epsilon, const Tensors& weights,
    const std::vector<bool>& is_packed, const std::vector<std::optional<Tensor>>& biases,
    const std::vector<std::optional<Tensor>>& residuals, const Tensors& lora_down, const Tensors& lora_up,
    const Integers64& lora_linear, const Integers64& lora_start, const Integers64& lora_tokens,
    const Integers64& lora_index) {
  const Tensor x = contiguous_rows(input);
  const int64_t in = x.size(-1), rows = x.numel() / in;
  check(norm_weight, {in}, "norm_weight");
  const size_t count = weights.size();
  STD_TORCH_CHECK(
      count > 0 && is_packed.size() == count && biases.size() == count && residuals.size() == count,
      "weights, is_packed, biases and residuals must have one length");
  std::vector<AdaptedLinear> linears;
  std::vector<const bf16*> added;
  std::vector<bf16*> addresses;
  Tensors outs;
  for (size_t i = 0; i < count; i++) {
    linears.push_back(linear_of(weights[i], is_packed[i], in, biases[i]));
    const Shape shape = with_width(x, linears[i].out);
    check(residuals[i], shape, "residual");
    added.push_back(data(residuals[i]));
    outs.push_back(torch::stable::new_empty(x, shape));
    addresses.push_back(output(outs[i]));
  }
  add_deltas(linears, rows, lora_down, lora_up, lora_linear, lora_start, lora_tokens, lora_index);
  run_linears(data(x), data(norm_weight), float(epsilon), linears, added, addresses, rows);
  return outs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HEFT_NAMESPACE, m) {
  m.def("amx_enable() -> bool");
  m.def("amx_pack(Tensor weight) -> Tensor");
  m.def(
      "amx_linears(Tensor x, Tensor? norm_weight, float epsilon, Tensor[] weights, bool[] is_packed, "
      "Tensor?[] biases, Tensor?[] residuals, " HEFT_LORA_SCHEMA ") -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CPU, m) {
  m.impl("amx_pack", TORCH_BOX(&amx_pack));
  m.impl("amx_linears", TORCH_BOX(&amx_linears));
}

// Without tensors among the arguments, no device chooses an implementation.
STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("amx_enable", TORCH_BOX(&amx_enable));
}

}  // namespace heft

#endif
