// AMX tiles, the layouts of operands in them, and the microkernel that multiplies them.
//
// A tile is 16 rows of 64 bytes. Activations: 16 rows by 32 inputs. Weights: 16 outputs by 32 inputs in VNNI layout, pairs
// of inputs beside each other; a *panel* is 16 outputs, in / 32 tiles. Sums: 16 rows by 16 outputs in FP32.

#pragma once

#if defined(__linux__) && defined(__AVX512BF16__) && (defined(__AMX_BF16__) || defined(HEFT_EMULATE_AMX))
#define HEFT_AMX 1

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "avx512.h"
#ifdef HEFT_EMULATE_AMX
#include HEFT_EMULATE_AMX
#endif

namespace heft {

constexpr long kTile = 16, kTileInputs = 32, kTileSize = kTile * kTileInputs, kBlock = 2 * kTile;

// Configures this thread's tiles for a scope: 8 tiles of 16 rows by 64 bytes.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; tile++) configuration.row_bytes[tile] = 64, configuration.rows[tile] = 16;
#ifndef HEFT_EMULATE_AMX
    asm volatile("ldtilecfg %0" : : "m"(configuration));
#endif
  }
  ~TileScope() { _tile_release(); }
};

// Uses of scratch memory. LoRA takes three in a row.
enum Scratch { kPanels, kSums, kRow, kRows, kActive, kQuery, kKeyValues, kScores, kShares, kLora, kUpLora = kLora + 3 };

// Memory of the calling thread, kept from call to call.
template <typename T, int kUse>
T* scratch(size_t elements) {
  thread_local struct Buffer {
    T* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  } buffer;
  if (buffer.size < elements) {
    std::free(buffer.data);
    buffer.size = (elements + 4095) / 4096 * 4096;
    buffer.data = static_cast<T*>(std::aligned_alloc(64, buffer.size * sizeof(T)));
    if (buffer.data == nullptr) std::abort();
  }
  return buffer.data;
}

// Packs 16 outputs of a weight (…, in) into a panel. The first `outs` of them exist; the others are zero.
inline void pack_panel(const bf16* weight, bf16* panel, long in, long outs = kTile) {
  for (long k = 0; k < in; k += kTileInputs, panel += kTileSize) {
    __m512i rows[16];
    for (int r = 0; r < 16; r++)
      rows[r] = r < outs ? _mm512_loadu_si512(weight + r * in + k) : _mm512_setzero_si512();
    transpose(rows);
    for (int r = 0; r < 16; r++) _mm512_store_si512(panel + r * kTileInputs, rows[r]);
  }
}

// Activations (rows, in) as [rows / 16][in / 32] tiles, in memory for whole blocks of 32 rows.
struct Activations {
  bf16* data;
  long rows, in;

  // The place of a row's inputs from `column` on.
  bf16* at(long row, long column) const {
    return data + row / kTile * kTile * in + column / kTileInputs * kTileSize + row % kTile * kTileInputs +
           column % kTileInputs;
  }

  void set_row(long row, const bf16* values) const {
    for (long column = 0; column < in; column += kTileInputs)
      std::memcpy(at(row, column), values + column, kTileInputs * sizeof(bf16));
  }

  // Whole blocks of rows: first … end - 1.
  Activations slice(long first, long end) const { return {data + first * in, end - first, in}; }
};

template <int kUse>
Activations scratch_activations(long rows, long in) {
  return {scratch<bf16, kUse>((rows + kBlock - 1) / kBlock * kBlock * in), rows, in};
}

// Two panels of a microkernel; from tile to tile of each, `step` elements.
struct PanelPair {
  const bf16 *left, *right;
  long step = kTileSize;
};

// The sums of a block, (32, stride) in FP32: 16 of the left panel, then 16 of the right.
struct Sums {
  float* data;
  long stride;
};

template <bool kLeft, bool kRight, bool kLower, typename Meanwhile>
inline void multiply_tiles(
    const bf16* upper_rows, const bf16* lower_rows, const PanelPair& panels, long steps, const Sums& sums,
    bool accumulate, const Meanwhile& meanwhile) {
  const long bytes = sums.stride * sizeof(float);
  float *upper = sums.data, *lower = upper + kTile * sums.stride;
  // Tile loads are invisible to the compiler: everything must be stored before them.
  asm volatile("" : : : "memory");
  if (accumulate) {
    if constexpr (kLeft) _tile_loadd(0, upper, bytes);
    if constexpr (kRight) _tile_loadd(1, upper + kTile, bytes);
    if constexpr (kLeft && kLower) _tile_loadd(2, lower, bytes);
    if constexpr (kRight && kLower) _tile_loadd(3, lower + kTile, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < steps; k++) {
    // Whole blocks of rows pass by once a panel pair; the panels are to stay in the cache.
    if constexpr (kLower) {
      _tile_stream_loadd(4, upper_rows + k * kTileSize, 64);
      _tile_stream_loadd(5, lower_rows + k * kTileSize, 64);
    } else {
      _tile_loadd(4, upper_rows + k * kTileSize, 64);
    }
    if constexpr (kLeft) _tile_loadd(6, panels.left + k * panels.step, 64);
    if constexpr (kRight) _tile_loadd(7, panels.right + k * panels.step, 64);
    if constexpr (kLeft) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLeft && kLower) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRight && kLower) _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  }
  if constexpr (kLeft) _tile_stored(0, upper, bytes);
  if constexpr (kRight) _tile_stored(1, upper + kTile, bytes);
  if constexpr (kLeft && kLower) _tile_stored(2, lower, bytes);
  if constexpr (kRight && kLower) _tile_stored(3, lower + kTile, bytes);
}

// The microkernel: sums (+)= x · panels, for the block of up to 32 rows that begins at `row`, over `steps` tiles of inputs
// from `first` on. kLeft and kRight choose panels. `meanwhile` runs once a step, on vector units that would idle. The
// order of additions is the same for every number of rows.
template <bool kLeft = true, bool kRight = true, typename Meanwhile>
inline void multiply_block(
    const Activations& x, long row, const PanelPair& panels, long first, long steps, const Sums& sums, bool accumulate,
    const Meanwhile& meanwhile) {
  const bf16 *upper = x.data + row * x.in + first * kTileSize, *lower = upper + kTile * x.in;
  if (x.rows - row > kTile) {
    multiply_tiles<kLeft, kRight, true>(upper, lower, panels, steps, sums, accumulate, meanwhile);
  } else {
    multiply_tiles<kLeft, kRight, false>(upper, lower, panels, steps, sums, accumulate, meanwhile);
  }
}

}  // namespace heft

#endif
