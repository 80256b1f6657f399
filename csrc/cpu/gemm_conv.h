// Convolutions as matrix products, in float32: any kernel, stride, padding and dilation, one group.
#pragma once

#include <array>

#include "tensors.h"

namespace us3l {

template <class T>
struct Images : Pixels<T> {
  int64_t count, height, width;
};

// The active slice of a weight [K, C, kh, kw]; distances in elements.
template <class T>
struct Weight {
  T* data;
  int64_t out, in, height, width;
  int64_t out_distance, in_distance, row, column;
};

struct Geometry {
  std::array<int64_t, 2> stride, padding, dilation;  // of rows, of columns
};

// y = convolution of x + bias, for `w.out` channels of y; bias may be null.
void convolve(const Images<const float>& x, const Weight<const float>& w, const float* bias, const Geometry& geometry,
              const Images<float>& y);

// dx = the adjoint of dy.
void convolve_input_gradient(const Images<const float>& dy, const Weight<const float>& w, const Geometry& geometry,
                             const Images<float>& dx);

// Adds to dw, and the sums of dy over all pixels to db [K] where that is not null. Pixels of dy are at one distance.
void convolve_weight_gradient(const Images<const float>& x, const Images<const float>& dy, const Geometry& geometry,
                              const Weight<float>* dw, double* db);

}  // namespace us3l
