// Norms, rotary embeddings and logits, each in one pass over memory: heft::rms_norm, rotary_embedding, logits.
//
// The first two have the bits of the torch operations named above them: they round to bfloat16 where those do and sum in
// their order.

#include "norms.h"
#include "torch_args.h"

namespace heft {

namespace {

// Elements below which waking other threads costs more than it saves.
constexpr long kParallelSize = 32768;

// weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)).bfloat16()
Tensor rms_norm(const Tensor& input, const Tensor& weight, double epsilon) {
  const Tensor x = contiguous_rows(input);
  const long width = x.size(-1), rows = x.numel() / width;
  check(weight, {width}, "weight");
  Tensor out = torch::stable::empty_like(x);
  const bf16 *from = data(x), *scale = data(weight);
  bf16* to = output(out);
#pragma omp parallel for if (rows * width > kParallelSize)
  for (long row = 0; row < rows; row++)
    normalize_row(from + row * width, scale, to + row * width, width, float(epsilon));
  return out;
}

// One head of a row: x * cos + torch.cat((-x[half:], x[:half])) * sin
inline void rotate_head(const bf16* x, const bf16* cosine, const bf16* sine, bf16* out, long half) {
  long i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const long j = half + i;
    const Floats a = load(x + i), b = load(x + j);
    store(out + i, round_to_bf16(a * load(cosine + i)) + round_to_bf16(-b * load(sine + i)));
    store(out + j, round_to_bf16(b * load(cosine + j)) + round_to_bf16(a * load(sine + j)));
  }
  for (; i < half; i++) {
    const long j = half + i;
    const float a = to_float(x[i]), b = to_float(x[j]);
    out[i] = to_bf16(round_to_bf16(a * to_float(cosine[i])) + round_to_bf16(-b * to_float(sine[i])));
    out[j] = to_bf16(round_to_bf16(b * to_float(cosine[j])) + round_to_bf16(a * to_float(sine[j])));
  }
}

// The rotary embedding of x (rows, heads, width) with cosine and sine ([1,] rows, width).
Tensor rotary_embedding(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (rows, heads, width)");
  const long rows = x.size(0), heads = x.size(1), width = x.size(2);
  check(x, {rows, heads, width}, "x");
  const Shape angles = cosine.dim() == 3 ? Shape{1, rows, width} : Shape{rows, width};
  check(cosine, angles, "cosine");
  check(sine, angles, "sine");
  Tensor out = torch::stable::empty_like(x);
  const bf16 *from = data(x), *cosines = data(cosine), *sines = data(sine);
  bf16* to = output(out);
#pragma omp parallel for if (rows * heads * width > kParallelSize)
  for (long row = 0; row < rows; row++)
    for (long head = row * heads; head < (row + 1) * heads; head++)
      rotate_head(from + head * width, cosines + row * width, sines + row * width, to + head * width, width / 2);
  return out;
}

// Up to 8 rows' sums with one row of weights, each in one order.
inline void dot_rows(const float* const* rows, const bf16* weight, long width, float* sums, long count) {
  constexpr long kRows = 8;
  const long whole = width / kLanes * kLanes;
  Floats totals[kRows] = {};
  for (long i = 0; i < whole; i += kLanes) {
    const Floats weights = load(weight + i);
#pragma GCC unroll 8
    for (long k = 0; k < kRows; k++) {
      Floats values;
      std::memcpy(&values, rows[k] + i, sizeof values);
      totals[k] = multiply_add(values, weights, totals[k]);
    }
  }
  for (long k = 0; k < count; k++) {
    float sum = 0;
    for (long i = whole; i < width; i++) sum += rows[k][i] * to_float(weight[i]);
    for (long lane = 0; lane < kLanes; lane++) sum += totals[k][lane];
    sums[k] = sum;
  }
}

// x (rows, width) · weight (columns, width)ᵀ in FP32, each sum in one order whatever the numbers of rows and threads.
Tensor logits(const Tensor& input, const Tensor& weight) {
  constexpr long kRows = 8;
  const Tensor x = contiguous_rows(input, ScalarType::Float);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must be (rows, width) and weight (columns, width)");
  const long rows = x.size(0), width = x.size(1), columns = weight.size(0);
  check(weight, {columns, width}, "weight");
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  const bf16* weights = data(weight);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
#pragma omp parallel for if (columns * width > kParallelSize)
  for (long column = 0; column < columns; column++)
    for (long first = 0; first < rows; first += kRows) {
      const long count = rows - first < kRows ? rows - first : kRows;
      const float* block[kRows];
      // The last row again where there are fewer.
      for (long k = 0; k < kRows; k++) block[k] = from + (first + (k < count ? k : count - 1)) * width;
      float sums[kRows];
      dot_rows(block, weights + column * width, width, sums, count);
      for (long k = 0; k < count; k++) to[(first + k) * columns + column] = sums[k];
    }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HEFT_NAMESPACE, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor");
  m.def("rotary_embedding(Tensor x, Tensor cosine, Tensor sine) -> Tensor");
  m.def("logits(Tensor x, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("logits", TORCH_BOX(&logits));
}

}  // namespace heft
