// Checks of operators' arguments. The dispatcher calls the operators for dense CPU tensors alone.
//
// They are bound through PyTorch's stable ABI, whose headers compile in a fraction of the time that torch/library.h takes.
// They have no gradients.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "vectors.h"

namespace heft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

inline const bf16* data(const Tensor& x) { return static_cast<const bf16*>(x.const_data_ptr()); }
inline const bf16* data(const std::optional<Tensor>& x) { return x ? data(*x) : nullptr; }
inline bf16* output(const Tensor& x) { return static_cast<bf16*>(x.mutable_data_ptr()); }
inline const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

inline Shape shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline Shape with_width(const Tensor& x, int64_t width) {
  Shape shape = shape_of(x);
  shape.back() = width;
  return shape;
}

inline std::string text_of(const Shape& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

// x must be contiguous, of a type and a shape.
inline void check(const Tensor& x, const Shape& shape, const char* name, ScalarType type = ScalarType::BFloat16) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", toString(type));
  const Shape actual = shape_of(x);
  STD_TORCH_CHECK(actual == shape, name, " must have the shape ", text_of(shape), ", not ", text_of(actual));
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check(const std::optional<Tensor>& x, const Shape& shape, const char* name) {
  if (x) check(*x, shape, name);
}

// x (…, width), made contiguous.
inline Tensor contiguous_rows(const Tensor& x, ScalarType type = ScalarType::BFloat16) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() > 0 && x.size(-1) > 0, "x must be (…, width) of ", toString(type));
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

}  // namespace heft
