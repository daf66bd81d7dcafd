// bfloat16 in memory and 16 values at a time in FP32, in compiler vector extensions: portable, one instruction each on
// AVX-512.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace heft {

using bf16 = uint16_t;
constexpr long kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest, ties to even, in the upper 16 bits. NaNs here come from bfloat16, so the carry can't reach the sign.
inline uint32_t rounded(uint32_t bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }
inline Words rounded(Words bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }

inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bf16(rounded(bits) >> 16);
}

inline Floats load(const bf16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(bf16* to, Floats x) {
  Halves narrowed = __builtin_convertvector(rounded((Words)x) >> 16, Halves);
  std::memcpy(to, &narrowed, sizeof narrowed);
}

// Rounded to bfloat16, back in FP32.
inline Floats round_to_bf16(Floats x) { return (Floats)(rounded((Words)x) & 0xffff0000u); }
inline float round_to_bf16(float x) { return to_float(to_bf16(x)); }

inline Floats broadcast(float x) { return Floats{} + x; }

// a · b + c with one rounding.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  Floats result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return result;
}

}  // namespace heft
