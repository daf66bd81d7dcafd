// The norm of decoder layers, with the bits of torch's operations.

#pragma once

#include "vectors.h"

namespace heft {

// torch sums eight lanes wide, whatever the machine has.
constexpr long kSumLanes = 8;
typedef float Sums __attribute__((vector_size(4 * kSumLanes)));
typedef uint32_t SumWords __attribute__((vector_size(4 * kSumLanes)));
typedef uint16_t SumHalves __attribute__((vector_size(2 * kSumLanes)));

inline Sums squares(const bf16* from) {
  SumHalves x;
  std::memcpy(&x, from, sizeof x);
  Sums values = (Sums)(__builtin_convertvector(x, SumWords) << 16);
  return values * values;
}

// x.float().pow(2).sum(): ATen/native/cpu/SumKernel.cpp, vectorized_inner_sum. Four running sums, added up in levels.
inline float sum_of_squares(const bf16* x, long width) {
  const long vectors = width / kSumLanes, groups = vectors / 4;
  long logarithm = 0;
  while ((1L << logarithm) < groups) logarithm++;
  const long power = logarithm / 4 > 4 ? logarithm / 4 : 4, step = 1L << power, mask = step - 1;
  Sums sums[4][4] = {};
  long done = 0;
  while (done + step <= groups) {
    for (long i = 0; i < step; i++, done++)
      for (int k = 0; k < 4; k++) sums[0][k] += squares(x + (done * 4 + k) * kSumLanes);
    for (int level = 1; level < 4; level++) {
      for (int k = 0; k < 4; k++) {
        sums[level][k] += sums[level - 1][k];
        sums[level - 1][k] = Sums{};
      }
      if (done & (mask << (level * power))) break;
    }
  }
  for (; done < groups; done++)
    for (int k = 0; k < 4; k++) sums[0][k] += squares(x + (done * 4 + k) * kSumLanes);
  for (int level = 1; level < 4; level++)
    for (int k = 0; k < 4; k++) sums[0][k] += sums[level][k];
  for (long vector = groups * 4; vector < vectors; vector++) sums[0][0] += squares(x + vector * kSumLanes);
  for (int k = 1; k < 4; k++) sums[0][0] += sums[0][k];
  float sum = 0;
  for (long i = vectors * kSumLanes; i < width; i++) sum += wide(x[i]) * wide(x[i]);
  for (int lane = 0; lane < kSumLanes; lane++) sum += sums[0][0][lane];
  return sum;
}

inline void normalise(const bf16* x, const bf16* weight, bf16* out, long width, float epsilon) {
  const float rate = 1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + epsilon);
  const Floats rates = every(rate);
  long i = 0;
  for (; i + kLanes <= width; i += kLanes)
    store(out + i, load(weight + i) * through_bf16(load(x + i) * rates));
  for (; i < width; i++) out[i] = narrow(wide(weight[i]) * through_bf16(wide(x[i]) * rate));
}

}  // namespace heft
