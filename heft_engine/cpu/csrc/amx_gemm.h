// The matrix product on AMX: a loop of the microkernel over a chunk of rows, and the epilogue.

#pragma once

#include "amx_tiles.h"
#include "norms.h"

namespace heft {

// x · weightᵀ + LoRA deltas + bias, a sum over `in` in one order whatever the rows beside a row and the threads, in FP32
// and rounded once. weight (out, in), row-major or packed by amx_pack; bias (out,) or null. `in` is a multiple of 32,
// `out` of 16.
struct Linear {
  const bf16* weight;
  bool is_packed;
  long in, out;
  const bf16* bias;

  long panels() const { return out / kTile; }
  long panel_pairs() const { return (panels() + 1) / 2; }

  // A panel of the weight, packed into one of this thread's two slots unless the weight is.
  const bf16* panel(long index, long slot) const {
    const bf16* panel = weight + index * kTile * in;
    if (is_packed) return panel;
    bf16* packed = scratch<bf16, kPanels>(2 * kTile * in) + slot * kTile * in;
    pack_panel(panel, packed, in);
    return packed;
  }

  // A packed panel to prefetch; null where there is none.
  const bf16* ahead(long index) const { return is_packed && index < panels() ? weight + index * kTile * in : nullptr; }
};

// Rows that a product takes at once: whole blocks, whose inputs stay in a core's second-level cache.
inline long rows_per_chunk(long in) {
  constexpr long kBytes = 1 << 20, kMostRows = 256;
  return std::max(kBlock, std::min(kMostRows, kBytes / long(in * sizeof(bf16)) / kBlock * kBlock));
}

// Tiles of inputs per pass over the rows: those of two panels, one kilobyte each, fit the first-level cache.
constexpr long kTilesPerPass = 18;

// Multiplies all rows of x by two panels. `finish(row, sums)` may add to the sums of the block that begins at a row;
// `take(row, left, right)` is given each row's 16 + 16 sums. Both panels of `next` are prefetched, unless one is null.
template <typename Finish, typename Take>
inline void panel_pair_product(
    const Activations& x, const PanelPair& panels, const PanelPair& next, const Finish& finish, const Take& take) {
  const long steps = x.in / kTileInputs, blocks = (x.rows + kBlock - 1) / kBlock;
  const bool is_one_pass = steps <= kTilesPerPass;
  float* all = scratch<float, kSums>((is_one_pass ? 2 : blocks) * kBlock * kBlock);
  const auto sums_of = [&](long block) {
    return Sums{all + (is_one_pass ? block % 2 : block) * kBlock * kBlock, kBlock};
  };
  // The sums of one block are taken while the next is multiplied.
  long taken = 0, ready = 0;
  const auto take_rows = [&](long count) {
    for (const long end = std::min(ready, taken + count); taken < end; taken++) {
      const float* at = sums_of(taken / kBlock).data + taken % kBlock * kBlock;
      take(taken, _mm512_load_ps(at), _mm512_load_ps(at + kTile));
    }
  };
  // The next panels are prefetched in equal shares with every step.
  constexpr long kLine = 64 / sizeof(bf16);
  const long size = kTile * x.in, lines = next.left && next.right ? 2 * size / kLine : 0;
  const long share = (lines + blocks * steps - 1) / (blocks * steps);
  long fetched = 0;
  const auto meanwhile = [&] {
    take_rows(2);
    for (const long end = std::min(lines, fetched + share); fetched < end; fetched++) {
      const long at = fetched * kLine;
      _mm_prefetch((const char*)(at < size ? next.left + at : next.right + at - size), _MM_HINT_T1);
    }
  };
  for (long first = 0; first < steps; first += kTilesPerPass) {
    const long count = std::min(kTilesPerPass, steps - first), offset = first * panels.step;
    const PanelPair part{panels.left + offset, panels.right + offset, panels.step};
    for (long block = 0; block < blocks; block++) {
      const long row = block * kBlock;
      multiply_block(x, row, part, first, count, sums_of(block), first > 0, meanwhile);
      if (first + count < steps) continue;
      finish(row, sums_of(block));
      take_rows(kBlock);
      ready = std::min(row + kBlock, x.rows);
    }
  }
  take_rows(kBlock);
}

// Panels 2 · pair and 2 · pair + 1 of out = linear(x), rounded, + residual, rounded. residual may be null; `lora` has the
// LoRA deltas.
template <typename Lora>
void linear_panels(
    const Activations& x, const Linear& linear, const bf16* residual, bf16* out, long pair, Lora& lora) {
  const long index = 2 * pair, column = index * kTile, width = linear.out;
  const bool both = index + 1 < linear.panels();
  const bf16 *left = linear.panel(index, 0), *right = both ? linear.panel(index + 1, 1) : left;
  lora.load_panels(column, width, both);
  const bf16* bias = linear.bias;
  const __m512 left_bias = bias ? (__m512)load(bias + column) : _mm512_setzero_ps();
  const __m512 right_bias = bias && both ? (__m512)load(bias + column + kTile) : _mm512_setzero_ps();
  const auto epilogue = [=](long row, __m512 low, __m512 high) {
    bf16* to = out + row * width + column;
    if (bias) low = _mm512_add_ps(low, left_bias), high = _mm512_add_ps(high, right_bias);
    if (residual) {
      const bf16* from = residual + row * width + column;
      low = (__m512)(round_sum(low) + load(from));
      if (both) high = (__m512)(round_sum(high) + load(from + kTile));
    }
    if (both) {
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
      _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(low));
    }
  };
  const auto add_lora = [&](long row, const Sums& sums) { lora.template accumulate<true, true>(row, sums); };
  panel_pair_product(x, {left, right}, {linear.ahead(index + 2), linear.ahead(index + 3)}, add_lora, epilogue);
}

// Writes norm(x) of x (rows, in) as tiles; x itself where norm is null. Every thread of a parallel region calls it; rows
// are shared out.
inline void to_tiles(const bf16* x, const bf16* norm, float epsilon, const Activations& to) {
  bf16* normed = scratch<bf16, kRow>(to.in);
#pragma omp for
  for (long row = 0; row < to.rows; row++) {
    const bf16* from = x + row * to.in;
    if (norm) normalize_row(from, norm, normed, to.in, epsilon);
    to.set_row(row, norm ? normed : from);
  }
}

}  // namespace heft
