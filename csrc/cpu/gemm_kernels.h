// Matrix products of float32 and of bfloat16, and the tables that hold them per instruction set. No torch headers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace us3l {

// a(i, k) = data[i * row + k * column]; or, where columns come in runs, data[i * row + k / run * next + k % run * column]
struct Matrix {
  const float* data;
  std::int64_t row, column;
  std::int64_t run = 0, next = 0;
};

// b(k, panel * lanes + j) = data[panel * panel_distance + k * row + j]
struct Panels {
  const float* data;
  std::int64_t panel, row;
};

// The rows of a block share what they read of the right side, and a block of a few hundred KiB stays in the L2 cache.
constexpr std::int64_t kMostRows = 112, kLeastRows = 56, kBlock = 64 << 10;  // the last in floats

struct GemmKernels {
  std::int64_t lanes;  // columns to a panel

  bool whole_halves(std::int64_t columns) const { return columns % (lanes / 2) == 0; }

  // c(i, :) = or += sum over k < depth of a(i, k) b(k, :); `add` says which. Columns are computed, and must be there,
  // up to a multiple of half a panel. The depth is one of whole runs.
  void (*multiply)(std::int64_t rows, std::int64_t columns, std::int64_t depth, Matrix a, Panels b, float* c,
                   std::int64_t c_row, bool add);

  // b [panels][depth][lanes], its panels `panel` apart, of a matrix of depth x columns; zero past its columns. One of
  // the matrix's distances is best 1.
  void (*pack)(std::int64_t depth, std::int64_t columns, Matrix from, float* b, std::int64_t panel);

  // to(i, :) = from(i, :), for rows of so many columns; the distances are those of two rows.
  void (*copy_rows)(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, float* to,
                    std::int64_t to_row);

  // sums[j] += sum over i < rows of a[i * row + j].
  void (*add_rows)(std::int64_t rows, std::int64_t columns, const float* a, std::int64_t row, double* sums);
};

// The same of bfloat16, summed in float32: what the matrices a and b consist of, and what is packed and copied, are words
// of two neighbours in depth. A word goes by the type float, which nothing but `multiply` reads as a number.
struct GemmPairKernels : GemmKernels {
  // words(j) = first(j), second(j).
  void (*pair_rows)(std::int64_t columns, const BFloat16* first, const BFloat16* second, float* words);

  // The same of what is rounded to bfloat16.
  void (*round_pairs)(std::int64_t columns, const float* first, const float* second, float* words);

  // to(i, :) = from(i, :) in bfloat16.
  void (*round_rows)(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_row, BFloat16* to,
                     std::int64_t to_row);
};

namespace portable {
GemmKernels gemm_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
GemmKernels gemm_kernels();
}
namespace avx512 {
GemmKernels gemm_kernels();
}
namespace avx512bf16 {
GemmPairKernels gemm_pair_kernels();
}
#endif

inline GemmKernels gemm_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::gemm_kernels();
    case Isa::avx2:
      return avx2::gemm_kernels();
#endif
    default:
      return portable::gemm_kernels();
  }
}

// Only where has_bfloat16_pairs() of isa.h.
inline GemmPairKernels gemm_pair_kernels() {
#if defined(__x86_64__)
  return avx512bf16::gemm_pair_kernels();
#else
  return {};
#endif
}

}  // namespace us3l
