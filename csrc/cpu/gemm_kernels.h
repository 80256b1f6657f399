// Matrix products of float32, and the table that holds them per instruction set. No torch headers.
#pragma once

#include <cstdint>

#include "isa.h"

namespace us3l {

// a(i, k) = data[i * row + k * column]
struct Matrix {
  const float* data;
  std::int64_t row, column;
};

// b(k, panel * lanes + j) = data[panel * panel_distance + k * row + j]
struct Panels {
  const float* data;
  std::int64_t panel, row;
};

struct GemmKernels {
  std::int64_t lanes;  // columns to a panel

  // c(i, :) = or += sum over k < depth of a(i, k) b(k, :), for whole panels; `add` says which.
  void (*multiply)(std::int64_t rows, std::int64_t panels, std::int64_t depth, Matrix a, Panels b, float* c,
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

}  // namespace us3l
