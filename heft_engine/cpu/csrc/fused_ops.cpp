// What a decoder layer does between its products, each in one pass over memory, for bfloat16 on a CPU.
//
// Every function gives the bits of the torch operations named above it: it rounds to bfloat16 where they do and sums in
// their order. heft_engine.cpu.fused_ops holds each to them before it is used.
//
// A matrix is (rows, width), its rows one behind the other.

#include "norms.h"

namespace {

using namespace heft;

// Elements from which it pays to wake other threads.
constexpr long kWorthThreads = 32768;

inline void add_to(const bf16* x, bf16* y, long width) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) store(y + i, load(x + i) + load(y + i));
  for (; i < width; i++) y[i] = narrow(wide(x[i]) + wide(y[i]));
}

}  // namespace

extern "C" {

// weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)).bfloat16()
void heft_rms_norm(const bf16* x, const bf16* weight, bf16* out, long rows, long width, float epsilon) {
#pragma omp parallel for if (rows * width > kWorthThreads)
  for (long row = 0; row < rows; row++) normalise(x + row * width, weight, out + row * width, width, epsilon);
}

// y.add_(x), and out = the norm of that.
void heft_add_rms_norm(
    const bf16* x, bf16* y, const bf16* weight, bf16* out, long rows, long width, float epsilon) {
#pragma omp parallel for if (rows * width > kWorthThreads)
  for (long row = 0; row < rows; row++) {
    add_to(x + row * width, y + row * width, width);
    normalise(y + row * width, weight, out + row * width, width, epsilon);
  }
}

// out[places] = x * cos + torch.cat((-x[..., width / 2 :], x[..., : width / 2]), -1) * sin, for each of a row's heads of
// `width`; out[gaps] = 0.
void heft_rotate(
    const bf16* x, const bf16* cosine, const bf16* sine, const int64_t* places, const int64_t* gaps, bf16* out,
    long rows, long empty, long heads, long width) {
  const long half = width / 2, whole = heads * width;
#pragma omp parallel for if (rows * whole > kWorthThreads)
  for (long row = 0; row < rows; row++) {
    const bf16 *cos_low = cosine + row * width, *cos_high = cos_low + half;
    const bf16 *sin_low = sine + row * width, *sin_high = sin_low + half;
    for (long head = 0; head < heads; head++) {
      const bf16 *from_low = x + row * whole + head * width, *from_high = from_low + half;
      bf16 *low = out + places[row] * whole + head * width, *high = low + half;
      long i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        const Floats a = load(from_low + i), b = load(from_high + i);
        store(low + i, through_bf16(a * load(cos_low + i)) + through_bf16(-b * load(sin_low + i)));
        store(high + i, through_bf16(b * load(cos_high + i)) + through_bf16(a * load(sin_high + i)));
      }
      for (; i < half; i++) {
        const float a = wide(from_low[i]), b = wide(from_high[i]);
        low[i] = narrow(through_bf16(a * wide(cos_low[i])) + through_bf16(-b * wide(sin_low[i])));
        high[i] = narrow(through_bf16(b * wide(cos_high[i])) + through_bf16(a * wide(sin_high[i])));
      }
    }
  }
  for (long gap = 0; gap < empty; gap++) std::memset(out + gaps[gap] * whole, 0, whole * sizeof(bf16));
}

// out[places] = x, out[gaps] = 0.
void heft_place(
    const bf16* x, const int64_t* places, const int64_t* gaps, bf16* out, long rows, long empty, long width) {
#pragma omp parallel for if (rows * width > kWorthThreads)
  for (long row = 0; row < rows; row++)
    std::memcpy(out + places[row] * width, x + row * width, width * sizeof(bf16));
  for (long gap = 0; gap < empty; gap++) std::memset(out + gaps[gap] * width, 0, width * sizeof(bf16));
}

// gate = torch.nn.functional.silu(gate) * up, n elements of each.
void heft_gate_silu(bf16* gate, const bf16* up, long n) {
  const long whole = n / kLanes * kLanes;
#pragma omp parallel for if (n > kWorthThreads)
  for (long i = 0; i < whole; i += kLanes)
    store(gate + i, through_bf16(silu(load(gate + i))) * load(up + i));
  if (whole == n) return;
  bf16 gates[kLanes] = {}, ups[kLanes] = {};
  std::memcpy(gates, gate + whole, (n - whole) * sizeof(bf16));
  std::memcpy(ups, up + whole, (n - whole) * sizeof(bf16));
  store(gates, through_bf16(silu(load(gates))) * load(ups));
  std::memcpy(gate + whole, gates, (n - whole) * sizeof(bf16));
}

// out (rows, columns) = x (rows, width) · weight (columns, width)ᵀ in single precision, every number summed in the same
// order whatever the numbers of rows and threads.
void heft_logits(const float* x, const bf16* weight, float* out, long rows, long width, long columns) {
  constexpr long kRows = 8;
  const long whole = width / kLanes * kLanes;
#pragma omp parallel for if (columns * width > kWorthThreads)
  for (long column = 0; column < columns; column++) {
    const bf16* w = weight + column * width;
    for (long first = 0; first < rows; first += kRows) {
      const float* from[kRows];
      Floats sums[kRows] = {};
      // Where there are no more rows, the last one once more.
      for (long k = 0; k < kRows; k++) from[k] = x + (first + k < rows ? first + k : rows - 1) * width;
      for (long i = 0; i < whole; i += kLanes) {
        const Floats weights = load(w + i);
#pragma GCC unroll 8
        for (long k = 0; k < kRows; k++) {
          Floats values;
          std::memcpy(&values, from[k] + i, sizeof values);
          sums[k] = multiply_add(values, weights, sums[k]);
        }
      }
      for (long k = 0; k < kRows && first + k < rows; k++) {
        float sum = 0;
        for (long i = whole; i < width; i++) sum += from[k][i] * wide(w[i]);
        for (long lane = 0; lane < kLanes; lane++) sum += sums[k][lane];
        out[(first + k) * columns + column] = sum;
      }
    }
  }
}

}  // extern "C"
