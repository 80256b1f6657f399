// The passes of batch norm over a matrix of rows x channels, and the table that holds them per instruction set.
//
// Pointers are to the first channel of the first row; `stride` is the distance of two rows in elements; per-channel
// vectors are as long as there are channels. No torch headers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace us3l {

// The activation as bounds on its input; NaN is no bound (a comparison with it is false).
struct Clamp {
  float low, high;
};

// z = (x - mean) * scale + bias
struct Affine {
  const float *mean, *scale, *bias;
};

template <class T>
struct BatchNormKernels {
  // mean and m2 (the sum of squared deviations from it) of each channel, one value at least.
  void (*statistics)(Rows<const T> x, std::int64_t rows, std::int64_t channels, double* mean, double* m2);

  // y = clamp(z(x) + residual); residual.data may be null.
  void (*normalise)(Rows<const T> x, Rows<const T> residual, Rows<T> y, std::int64_t rows, std::int64_t channels,
                    Affine affine, Clamp clamp);

  // sum_g = sum of g and sum_gx = sum of g * (x - mean), where g is grad where the activation's output is inside the
  // clamp, zero elsewhere. That output is y if y.data is not null (then g is written to `masked`, if that is not null);
  // else it is z(x) once more, with affine.bias not null; and with neither, g is grad.
  void (*reduce)(Rows<const T> grad, Rows<const T> x, Rows<const T> y, Rows<T> masked, std::int64_t rows,
                 std::int64_t channels, Affine affine, Clamp clamp, double* sum_g, double* sum_gx);

  // dx = g * scale + (x - mean) * slope + offset; with affine.bias not null, g is grad behind the mask of z(x), else
  // grad itself. dx may be grad.
  void (*input_gradient)(Rows<const T> grad, Rows<const T> x, Rows<T> dx, std::int64_t rows, std::int64_t channels,
                         Affine affine, const float* slope, const float* offset, Clamp clamp);
};

namespace portable {
template <class T> BatchNormKernels<T> batch_norm_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T> BatchNormKernels<T> batch_norm_kernels();
}
namespace avx512 {
template <class T> BatchNormKernels<T> batch_norm_kernels();
}
#endif

template <class T>
BatchNormKernels<T> batch_norm_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::batch_norm_kernels<T>();
    case Isa::avx2:
      return avx2::batch_norm_kernels<T>();
#endif
    default:
      return portable::batch_norm_kernels<T>();
  }
}

}  // namespace us3l
