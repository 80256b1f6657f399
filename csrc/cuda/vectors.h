// Values of memory as floats: 16 bytes to an access, or one element where the data lie otherwise.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "launch.h"

namespace us3l::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kAccess = 16;  // bytes of the widest access

// Elements of T in one access.
template <class T>
constexpr int kWidth = kAccess / static_cast<int>(sizeof(T));

template <class T, int W>
struct alignas(W * sizeof(T)) Vector {
  T at[W];
};

__host__ __device__ inline bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kAccess == 0;
}

// Pieces of 16 bytes, if W elements are more.
template <class T, int W>
constexpr int kPiece = W < kWidth<T> ? W : kWidth<T>;

template <int W, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[W]) {
  constexpr int P = kPiece<T, W>;
#pragma unroll
  for (int i = 0; i < W; i += P) {
    const auto piece = *reinterpret_cast<const Vector<T, P>*>(from + i);
#pragma unroll
    for (int k = 0; k < P; ++k) to[i + k] = static_cast<float>(piece.at[k]);
  }
}

template <int W, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[W]) {
  constexpr int P = kPiece<T, W>;
#pragma unroll
  for (int i = 0; i < W; i += P) {
    Vector<T, P> piece;
#pragma unroll
    for (int k = 0; k < P; ++k) piece.at[k] = static_cast<T>(from[i + k]);
    *reinterpret_cast<Vector<T, P>*>(to + i) = piece;
  }
}

}  // namespace us3l::cuda
