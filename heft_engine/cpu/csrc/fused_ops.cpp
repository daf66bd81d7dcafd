// What a decoder layer does between its products, each in one pass over memory: heft::rms_norm, rotary_embedding, ….
//
// Every operator but logits has the bits of the torch operations named above it: it rounds to bfloat16 where they do and
// sums in their order.

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

inline void add_row(const bf16* x, bf16* y, long width) {
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) store(y + i, load(x + i) + load(y + i));
  for (; i < width; i++) y[i] = to_bf16(to_float(x[i]) + to_float(y[i]));
}

// rms_norm(y.add_(x))
Tensor add_rms_norm(const Tensor& input, const Tensor& y, const Tensor& weight, double epsilon) {
  const Tensor x = contiguous_rows(input);
  const long width = x.size(-1), rows = x.numel() / width;
  check(y, shape_of(x), "y");
  check(weight, {width}, "weight");
  Tensor out = torch::stable::empty_like(x);
  const bf16 *from = data(x), *scale = data(weight);
  bf16 *total = output(y), *to = output(out);
#pragma omp parallel for if (rows * width > kParallelSize)
  for (long row = 0; row < rows; row++) {
    add_row(from + row * width, total + row * width, width);
    normalize_row(total + row * width, scale, to + row * width, width, float(epsilon));
  }
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

void check_places(const Tensor& places, long count, long end, const char* name) {
  check(places, {count}, name, ScalarType::Long);
  for (long i = 0; i < count; i++)
    STD_TORCH_CHECK(integers(places)[i] >= 0 && integers(places)[i] < end, name, " must be from 0 to ", end - 1);
}

// The rotary embedding of x (rows, heads, width) with cosine and sine ([1,] rows, width): row i at places[i], zeros at gaps.
Tensor rotary_embedding(
    const Tensor& x, const Tensor& cosine, const Tensor& sine, const Tensor& places, const Tensor& gaps) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (rows, heads, width)");
  const long rows = x.size(0), heads = x.size(1), width = x.size(2), n_gaps = gaps.numel(), size = heads * width;
  check(x, {rows, heads, width}, "x");
  const Shape angles = cosine.dim() == 3 ? Shape{1, rows, width} : Shape{rows, width};
  check(cosine, angles, "cosine");
  check(sine, angles, "sine");
  check_places(places, rows, rows + n_gaps, "places");
  check_places(gaps, n_gaps, rows + n_gaps, "gaps");
  Tensor out = torch::stable::new_empty(x, {rows + n_gaps, heads, width});
  const bf16 *from = data(x), *cosines = data(cosine), *sines = data(sine);
  const int64_t *place = integers(places), *gap = integers(gaps);
  bf16* to = output(out);
#pragma omp parallel for if (rows * size > kParallelSize)
  for (long row = 0; row < rows; row++)
    for (long at = 0; at < size; at += width)
      rotate_head(
          from + row * size + at, cosines + row * width, sines + row * width, to + place[row] * size + at, width / 2);
  for (long i = 0; i < n_gaps; i++) std::memset(to + gap[i] * size, 0, size * sizeof(bf16));
  return out;
}

// x (rows, heads, width): row i at places[i], zeros at gaps.
Tensor scatter_rows(const Tensor& x, const Tensor& places, const Tensor& gaps) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be (rows, heads, width)");
  const long rows = x.size(0), n_gaps = gaps.numel(), size = x.size(1) * x.size(2);
  check(x, shape_of(x), "x");
  check_places(places, rows, rows + n_gaps, "places");
  check_places(gaps, n_gaps, rows + n_gaps, "gaps");
  Tensor out = torch::stable::new_empty(x, {rows + n_gaps, x.size(1), x.size(2)});
  const int64_t *place = integers(places), *gap = integers(gaps);
  const bf16* from = data(x);
  bf16* to = output(out);
#pragma omp parallel for if (rows * size > kParallelSize)
  for (long row = 0; row < rows; row++) std::memcpy(to + place[row] * size, from + row * size, size * sizeof(bf16));
  for (long i = 0; i < n_gaps; i++) std::memset(to + gap[i] * size, 0, size * sizeof(bf16));
  return out;
}

// gate.copy_(torch.nn.functional.silu(gate) * up)
void silu_mul(const Tensor& gate, const Tensor& up) {
  check(gate, shape_of(gate), "gate");
  check(up, shape_of(gate), "up");
  bf16* gates = output(gate);
  const bf16* ups = data(up);
  const long n = gate.numel(), whole = n / kLanes * kLanes;
#pragma omp parallel for if (n > kParallelSize)
  for (long i = 0; i < whole; i += kLanes) store(gates + i, round_to_bf16(silu(load(gates + i))) * load(ups + i));
  if (whole == n) return;
  bf16 last_gates[kLanes] = {}, last_ups[kLanes] = {};
  std::memcpy(last_gates, gates + whole, (n - whole) * sizeof(bf16));
  std::memcpy(last_ups, ups + whole, (n - whole) * sizeof(bf16));
  store(last_gates, round_to_bf16(silu(load(last_gates))) * load(last_ups));
  std::memcpy(gates + whole, last_gates, (n - whole) * sizeof(bf16));
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
  m.def("add_rms_norm(Tensor x, Tensor(a!) y, Tensor weight, float epsilon) -> Tensor");
  m.def("rotary_embedding(Tensor x, Tensor cosine, Tensor sine, Tensor places, Tensor gaps) -> Tensor");
  m.def("scatter_rows(Tensor x, Tensor places, Tensor gaps) -> Tensor");
  m.def("silu_mul(Tensor(a!) gate, Tensor up) -> ()");
  m.def("logits(Tensor x, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("logits", TORCH_BOX(&logits));
}

}  // namespace heft
