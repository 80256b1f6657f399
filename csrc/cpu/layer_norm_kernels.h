// The passes of layer norm over a matrix of rows x channels, and the table that holds them per instruction set. No torch
// headers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace us3l {

template <class T>
struct LayerNormKernels {
  // y = (x - mean) * rstd * weight + bias, with mean and rstd of each row.
  void (*forward)(Rows<const T> x, Rows<T> y, std::int64_t rows, std::int64_t channels, const float* weight,
                  const float* bias, double eps, float* mean, float* rstd);

  // dx, where dx.data is not null; and where `totals` is not null, totals[0][:] += sum of grad * normalised x and
  // totals[1][:] += sum of grad over the rows. sums [2][channels] is zero, before and after; null without totals.
  void (*backward)(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
                   const float* weight, const float* mean, const float* rstd, float* sums, double* totals);
};

namespace portable {
template <class T> LayerNormKernels<T> layer_norm_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T> LayerNormKernels<T> layer_norm_kernels();
}
namespace avx512 {
template <class T> LayerNormKernels<T> layer_norm_kernels();
}
#endif

template <class T>
LayerNormKernels<T> layer_norm_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::layer_norm_kernels<T>();
    case Isa::avx2:
      return avx2::layer_norm_kernels<T>();
#endif
    default:
      return portable::layer_norm_kernels<T>();
  }
}

}  // namespace us3l
