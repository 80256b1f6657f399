// Element types and access widths, chosen at run time for kernels that are templates of them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "vectors.h"

namespace us3l::cuda {

using torch::headeronly::ScalarType;

// f(T()) for float, BFloat16 or Half.
template <class F>
auto for_type(const char* op, const char* name, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Half());
    default:
      STD_TORCH_CHECK(type == ScalarType::Float, op, ": ", name, ": expected float32, bfloat16 or float16");
      return f(float());
  }
}

// f(W) with W a constant: the elements of a 16-byte access, or 1.
template <class T, class F>
auto for_width(bool vectors, const F& f) {
  return vectors ? f(std::integral_constant<int, kWidth<T>>()) : f(std::integral_constant<int, 1>());
}

}  // namespace us3l::cuda
