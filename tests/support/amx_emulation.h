// The AMX tile instructions in AVX-512, for tests on processors without AMX. Include instead of the real ones, after
// immintrin.h.
//
// TDPBF16PS as Intel's manual has it (Software Developer's Manual, volume 2): FP32, even and odd products of a row summed
// apart over the tile's depth, then added to each other and to the destination; every step rounded to nearest even,
// denormals in and out are zero.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace heft::emulation {

struct alignas(64) Tile {
  uint32_t words[16][16];
};
inline thread_local Tile tiles[8];

inline void zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }

inline void load(int tile, const void* from, long stride) {
  for (int row = 0; row < 16; row++)
    std::memcpy(tiles[tile].words[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, long stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].words[row], 64);
}

inline void multiply_bf16(int sums, int a, int b) {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40, kExceptionsMasked = 0x1f80;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kFlushToZero | kDenormalsAreZero | kExceptionsMasked);
  asm volatile("" : : : "memory");
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  for (int row = 0; row < 16; row++) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < 16; k++) {
      const __m512i left = _mm512_set1_epi32(int(tiles[a].words[row][k]));
      const __m512i right = _mm512_load_si512(tiles[b].words[k]);
      const __m512 left_even = (__m512)_mm512_slli_epi32(left, 16), right_even = (__m512)_mm512_slli_epi32(right, 16);
      const __m512 left_odd = (__m512)_mm512_and_si512(left, upper), right_odd = (__m512)_mm512_and_si512(right, upper);
      even = _mm512_fmadd_ps(left_even, right_even, even);
      odd = _mm512_fmadd_ps(left_odd, right_odd, odd);
    }
    float* to = reinterpret_cast<float*>(tiles[sums].words[row]);
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
  }
  asm volatile("" : : : "memory");
  _mm_setcsr(before);
}

}  // namespace heft::emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_release() static_cast<void>(0)
#define _tile_zero heft::emulation::zero
#define _tile_loadd heft::emulation::load
#define _tile_stream_loadd heft::emulation::load
#define _tile_stored heft::emulation::store
#define _tile_dpbf16ps heft::emulation::multiply_bf16
