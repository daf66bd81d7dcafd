// What the AMX kernels compute in AVX-512 around their tiles: transposes, interleaving, exponentials.

#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace heft {

// 16 × 16 words, in place: row r becomes column r.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The permutation that interleaves elements start … start + 15 of two bfloat16 vectors: a0 b0 a1 b1 …
inline __m512i interleaving(int start) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 16; i++) index[2 * i] = start + i, index[2 * i + 1] = 32 + start + i;
  return _mm512_load_si512(index);
}

inline Floats round_sum(__m512 sum) { return round_to_bf16((Floats)sum); }

// 2 to the power of x, to a relative error of 2e-7.
inline __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.61812911e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.55041087e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40226507e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93147181e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// SiLU. Once rounded to bfloat16 it has torch's bits for every bfloat16 x of 2⁻¹²⁵ and more; heft_engine.cpu.selftest
// tries them all.
inline __m512 silu_of_bf16(__m512 x) {
  const __m512 infinite = _mm512_set1_ps(INFINITY);
  __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896340736f));
  power = _mm512_max_ps(_mm512_min_ps(power, _mm512_set1_ps(127.9f)), _mm512_set1_ps(-200.0f));
  const __m512 divisor = _mm512_add_ps(exp2(power), _mm512_set1_ps(1.0f));
  // A Newton step on the approximate reciprocal, then the remainder of the quotient.
  __m512 reciprocal = _mm512_rcp14_ps(divisor);
  reciprocal = _mm512_mul_ps(reciprocal, _mm512_fnmadd_ps(divisor, reciprocal, _mm512_set1_ps(2.0f)));
  const __m512 quotient = _mm512_mul_ps(x, reciprocal);
  const __m512 remainder = _mm512_fnmadd_ps(divisor, quotient, x);
  // Below -88.75 torch's exponential is infinite and the result zero; -infinity and NaN give NaN.
  __mmask16 is_zero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-88.75f), _CMP_LE_OQ);
  is_zero &= _mm512_cmp_ps_mask(x, _mm512_sub_ps(_mm512_setzero_ps(), infinite), _CMP_NEQ_UQ);
  const __m512 result = _mm512_maskz_fmadd_ps(_mm512_knot(is_zero), remainder, reciprocal, quotient);
  return _mm512_mask_mov_ps(result, _mm512_cmp_ps_mask(x, infinite, _CMP_EQ_OQ), infinite);
}

}  // namespace heft
