// RMSNorm with the bits of torch's operations.

#pragma once

#include "vectors.h"

namespace heft {

// torch sums eight lanes wide on every processor.
constexpr long kEight = 8;
typedef float EightFloats __attribute__((vector_size(4 * kEight)));
typedef uint32_t EightWords __attribute__((vector_size(4 * kEight)));
typedef uint16_t EightHalves __attribute__((vector_size(2 * kEight)));

inline EightFloats squares(const bf16* from) {
  EightHalves x;
  std::memcpy(&x, from, sizeof x);
  EightFloats values = (EightFloats)(__builtin_convertvector(x, EightWords) << 16);
  return values * values;
}

// x.float().pow(2).sum(), in the order of ATen/native/cpu/SumKernel.cpp, vectorized_inner_sum: four accumulators, added
// up in levels.
inline float sum_of_squares(const bf16* x, long width) {
  const long vectors = width / kEight, groups = vectors / 4;
  long logarithm = 0;
  while ((1L << logarithm) < groups) logarithm++;
  const long power = logarithm / 4 > 4 ? logarithm / 4 : 4, step = 1L << power, mask = step - 1;
  EightFloats sums[4][4] = {};
  long done = 0;
  while (done + step <= groups) {
    for (long i = 0; i < step; i++, done++)
      for (int k = 0; k < 4; k++) sums[0][k] += squares(x + (done * 4 + k) * kEight);
    for (int level = 1; level < 4; level++) {
      for (int k = 0; k < 4; k++) {
        sums[level][k] += sums[level - 1][k];
        sums[level - 1][k] = EightFloats{};
      }
      if (done & (mask << (level * power))) break;
    }
  }
  for (; done < groups; done++)
    for (int k = 0; k < 4; k++) sums[0][k] += squares(x + (done * 4 + k) * kEight);
  for (int level = 1; level < 4; level++)
    for (int k = 0; k < 4; k++) sums[0][k] += sums[level][k];
  for (long vector = groups * 4; vector < vectors; vector++) sums[0][0] += squares(x + vector * kEight);
  for (int k = 1; k < 4; k++) sums[0][0] += sums[0][k];
  float sum = 0;
  for (long i = vectors * kEight; i < width; i++) sum += to_float(x[i]) * to_float(x[i]);
  for (int lane = 0; lane < kEight; lane++) sum += sums[0][0][lane];
  return sum;
}

// weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)).bfloat16() of one row.
inline void normalize_row(const bf16* x, const bf16* weight, bf16* out, long width, float epsilon) {
  const float rate = 1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + epsilon);
  const Floats rates = broadcast(rate);
  long i = 0;
  for (; i + kLanes <= width; i += kLanes)
    store(out + i, load(weight + i) * round_to_bf16(load(x + i) * rates));
  for (; i < width; i++) out[i] = to_bf16(to_float(weight[i]) * round_to_bf16(to_float(x[i]) * rate));
}

}  // namespace heft
