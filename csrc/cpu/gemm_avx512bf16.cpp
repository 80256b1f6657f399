#include <immintrin.h>

#include "gemm_kernels.h"

// The options are set here and not on the command line, after every header: no inline function of another file may be
// compiled with instructions that the CPU might not have.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2")
#endif

namespace us3l::avx512bf16 {
constexpr int LANES = 16;
template <class V>
inline __attribute__((always_inline)) V multiply_add_pairs(V sum, float left, V right) {
  if constexpr (sizeof(V) == sizeof(__m512))
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)right);
  else
    return (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_ps(left), (__m256bh)right);
}
#define US3L_MULTIPLY_ADD multiply_add_pairs
#include "gemm_body.h"

#include "bfloat16_body.h"

template <int W>
US3L_INLINE typename Lanes<W>::Word words(const BFloat16* p) {
  typename Lanes<W>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, typename Lanes<W>::Word);
}

template <int W>
US3L_INLINE typename Lanes<W>::Word words(const float* p) {
  return nearest<W>(load<W>(p)) >> 16;
}

template <int W, class T>
void pair(std::int64_t columns, const T* first, const T* second, float* to) {
  std::int64_t j = 0;
  for (; j + W <= columns; j += W) store<W>(to + j, (Float<W>)(words<W>(first + j) | words<W>(second + j) << 16));
  if constexpr (W > 1) {
    if (j < columns) pair<W / 2>(columns - j, first + j, second + j, to + j);
  }
}

template <int W>
void round_rows(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, BFloat16* to,
                std::int64_t to_row) {
  const std::int64_t whole = columns / W * W;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < whole; j += W) {
      const Float<W> v = load<W>(from + i * from_row + j);
      if constexpr (W == LANES) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)v);  // the instruction for store<W>
        __builtin_memcpy(to + i * to_row + j, &half, sizeof half);
      } else {
        store<W>(to + i * to_row + j, v);
      }
    }
  }
  if constexpr (W > 1) {
    if (whole < columns) round_rows<W / 2>(rows, columns - whole, from + whole, from_row, to + whole, to_row);
  }
}

GemmPairKernels gemm_pair_kernels() {
  return {gemm_kernels(), pair<LANES, BFloat16>, pair<LANES, float>, round_rows<LANES>};
}
}  // namespace us3l::avx512bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
