// Linear layers and LoRA deltas as the AMX operators take them.

#pragma once

#include "amx_lora.h"
#include "torch_args.h"

// Delta i adds x · lora_down[i][index]ᵀ · lora_up[i][index] to rows start … start + tokens - 1 of linear layer `linear`:
// lora_down[i] (n, rank, in), lora_up[i] (n, rank, out).
#define HEFT_LORA_SCHEMA \
  "Tensor[] lora_down, Tensor[] lora_up, int[] lora_linear, int[] lora_start, int[] lora_tokens, int[] lora_index"

namespace heft {

using Integers64 = std::vector<int64_t>;

inline AdaptedLinear linear_of(
    const Tensor& weight, bool is_packed, int64_t in, const std::optional<Tensor>& bias = std::nullopt) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be (out, in)");
  const int64_t out = weight.size(0);
  check(weight, {out, in}, "weight");
  check(bias, {out}, "bias");
  STD_TORCH_CHECK(in % kTileInputs == 0 && out % kTile == 0, "a weight must have 32 · n inputs and 16 · n outputs");
  return {{data(weight), is_packed, in, out, data(bias)}, {}};
}

inline void add_deltas(
    std::vector<AdaptedLinear>& linears, int64_t rows, const Tensors& down, const Tensors& up, const Integers64& linear,
    const Integers64& start, const Integers64& tokens, const Integers64& index) {
  const size_t count = down.size();
  for (size_t length : {up.size(), linear.size(), start.size(), tokens.size(), index.size()})
    STD_TORCH_CHECK(length == count, "the arguments of LoRA deltas must have one length");
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(linear[i] >= 0 && linear[i] < long(linears.size()), "lora_linear must be that of a weight");
    STD_TORCH_CHECK(
        start[i] >= 0 && tokens[i] >= 0 && start[i] + tokens[i] <= rows, "a LoRA delta must lie within the rows of x");
    STD_TORCH_CHECK(down[i].dim() == 3, "lora_down must be (n, rank, in)");
    const int64_t n = down[i].size(0), rank = down[i].size(1);
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < n, "lora_index must be from 0 to n - 1");
    AdaptedLinear& to = linears[linear[i]];
    check(down[i], {n, rank, to.in}, "lora_down");
    check(up[i], {n, rank, to.out}, "lora_up");
    const bf16 *down_data = data(down[i]) + index[i] * rank * to.in, *up_data = data(up[i]) + index[i] * rank * to.out;
    to.deltas.push_back({start[i], tokens[i], down_data, up_data, rank});
  }
}

}  // namespace heft
