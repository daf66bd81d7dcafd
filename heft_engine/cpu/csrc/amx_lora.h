// LoRA deltas inside a product on AMX: added to its FP32 sums before they are rounded.

#pragma once

#include "amx_gemm.h"

namespace heft {

// Adds (x · downᵀ, rounded) · up to rows start … start + tokens - 1 of a product. down (rank, in), up (rank, out). The
// rows beside them get zero times `up`, so `up` must be finite.
struct LoraDelta {
  long start, tokens;
  const bf16 *down, *up;
  long rank;
};

struct AdaptedLinear : Linear {
  std::vector<LoraDelta> deltas;
};

// The deltas that touch a chunk of a product's rows, for one thread. kUse: its scratch memory.
template <int kUse>
class ChunkLora {
 public:
  // Computes x · downᵀ, rounded, for the chunk x that begins at row `first` of the pass.
  ChunkLora(const std::vector<LoraDelta>& deltas, const Activations& x, long first) {
    size_t room = 0;
    for (const LoraDelta& delta : deltas) {
      const long begin = std::max(delta.start - first, 0L);
      const long end = std::min(delta.start + delta.tokens - first, x.rows);
      if (begin >= end) continue;
      const long first_block = begin / kBlock * kBlock, rows = (end + kBlock - 1) / kBlock * kBlock - first_block;
      const long ranks = (delta.rank + kTileInputs - 1) / kTileInputs * kTileInputs;
      parts_.push_back({&delta, begin, end, first_block, room, {nullptr, rows, ranks}});
      room += rows * ranks;
    }
    if (parts_.empty()) return;
    bf16* low = scratch<bf16, kUse>(room);
    std::memset(low, 0, room * sizeof(bf16));
    for (Part& part : parts_) {
      part.low.data = low + part.room;
      for (long rank = 0; rank < part.low.in; rank += kTileInputs) project_down(part, rank, x);
    }
  }

  // Packs `up` for the panel that begins at `column`, or for the two from there.
  void load_panels(long column, long width, bool both) {
    if (parts_.empty()) return;
    size_t room = 0;
    for (Part& part : parts_) part.room = room, room += part.low.in * kBlock;
    panels_ = scratch<bf16, kUse + 2>(room);
    for (const Part& part : parts_) pack_up(part, part.delta->up + column, width, both ? ~0u : 0xffffu);
  }

  // Adds to the sums of the block that begins at `row`: to the left ones, the right ones, or both. A single side takes
  // the first of the packed panels.
  template <bool kLeft, bool kRight>
  void accumulate(long row, const Sums& sums) const {
    for (const Part& part : parts_) {
      if (row < part.first_block || row >= part.first_block + part.low.rows) continue;
      const bf16* panel = panels_ + part.room;
      const PanelPair panels{panel, kLeft ? panel + kTileSize : panel, 2 * kTileSize};
      const long steps = part.low.in / kTileInputs;
      multiply_block<kLeft, kRight>(part.low, row - part.first_block, panels, 0, steps, sums, true, [] {});
    }
  }

 private:
  // A delta's rows begin … end - 1 of the chunk, with x · downᵀ of its whole blocks of rows and zeros at the others. `room`
  // is where that begins in scratch memory, and later where the packed `up` does.
  struct Part {
    const LoraDelta* delta;
    long begin, end, first_block;
    size_t room;
    Activations low;
  };

  // 32 columns of x · downᵀ, from `rank` on.
  void project_down(const Part& part, long rank, const Activations& x) {
    bf16 *left = scratch<bf16, kUse + 1>(2 * kTile * x.in), *right = left + kTile * x.in;
    const bf16* down = part.delta->down + rank * x.in;
    const long ranks = part.delta->rank - rank;
    pack_panel(down, left, x.in, std::min(ranks, kTile));
    pack_panel(down + kTile * x.in, right, x.in, std::clamp(ranks - kTile, 0L, kTile));
    panel_pair_product(
        x.slice(part.first_block, std::min(part.first_block + part.low.rows, x.rows)), {left, right}, {},
        [](long, const Sums&) {}, [&](long row, __m512 low, __m512 high) {
          if (row + part.first_block >= part.begin && row + part.first_block < part.end)
            _mm512_store_si512(part.low.at(row, rank), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        });
  }

  void pack_up(const Part& part, const bf16* up, long width, __mmask32 mask) {
    const __m512i low = interleaving(0), high = interleaving(16);
    const auto row = [&](long rank) {
      return rank < part.delta->rank ? _mm512_maskz_loadu_epi16(mask, up + rank * width) : _mm512_setzero_si512();
    };
    bf16* to = panels_ + part.room;
    for (long rank = 0; rank < part.low.in; rank += 2) {
      const __m512i even = row(rank), odd = row(rank + 1);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(to + kTileSize, _mm512_permutex2var_epi16(even, high, odd));
      to += rank % kTileInputs == kTileInputs - 2 ? kTileSize + kTileInputs : kTileInputs;
    }
  }

  std::vector<Part> parts_;
  bf16* panels_ = nullptr;
};

}  // namespace heft
