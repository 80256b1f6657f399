// Depthwise convolution one row of pixels at a time, and the table that holds its kernels per instruction set. No torch
// headers.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace us3l {

// One dimension of a correlation: output i is a sum over taps t < taps of input i * stride + t * step + offset, where
// there is one: of 0 .. size - 1.
struct Axis {
  std::int64_t taps, stride, step, offset, size;
};

// Pixels with channels innermost, at one distance.
template <class T>
struct Line {
  T* data;
  std::int64_t pixel, count;
};

// The rows of the input under one row of the output. Those outside of the image are left out.
template <class T>
struct Window {
  const T* data;  // pixel 0 of the first
  std::int64_t row, pixel, rows;
};

// A stretch of memory that later calls need, to be asked for meanwhile: an address alone, for nothing may be there.
struct Stretch {
  std::uintptr_t from;
  std::int64_t bytes;
};

template <class T>
struct DepthwiseKernels {
  std::int64_t lanes;

  // y[i, :] = bias + sum over r, t of filters[r][t][:] * x[r][i * stride + t * step + offset, :]
  void (*correlate)(const Axis& axis, const Window<T>& x, const float* filters, const float* bias, const Line<T>& y,
                    std::int64_t channels, const Stretch& ahead_of_x, const Stretch& ahead_of_y);

  // sums[r][t][:] += sum over i of dy[i, :] * x[r][i * stride + t * step + offset, :]
  //
  // A row of sums is channels rounded up to `lanes` long, and in an order of its own that `flush` knows.
  void (*accumulate)(const Axis& axis, const Window<T>& x, const Line<const T>& dy, float* sums, std::int64_t channels,
                     const Stretch& ahead_of_x, const Stretch& ahead_of_dy);

  // totals[n][:] += sums[n][:] for n < count, then sums = 0.
  void (*flush)(float* sums, double* totals, std::int64_t count, std::int64_t channels);
};

namespace portable {
template <class T> DepthwiseKernels<T> depthwise_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T> DepthwiseKernels<T> depthwise_kernels();
}
namespace avx512 {
template <class T> DepthwiseKernels<T> depthwise_kernels();
}
#endif

template <class T>
DepthwiseKernels<T> depthwise_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::depthwise_kernels<T>();
    case Isa::avx2:
      return avx2::depthwise_kernels<T>();
#endif
    default:
      return portable::depthwise_kernels<T>();
  }
}

}  // namespace us3l
